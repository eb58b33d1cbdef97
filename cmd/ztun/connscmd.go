package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"ztun/admin"
	"ztun/admin/words"
)

// asker is what the commands that ask a running daemon share.
type asker struct{ socket string }

// bind adds --socket, to cmd and what is below it.
func (a *asker) bind(cmd *cobra.Command) {
	cmd.PersistentFlags().StringVar(&a.socket, "socket", defaultSocket(os.Getenv),
		"control socket of the daemon (ZTUN_SOCKET)")
}

// bindRun adds --run, which is another way to say which socket.
func (a *asker) bindRun(cmd *cobra.Command) {
	cmd.Flags().Var((*runRef)(a), "run", "ask this 'ztun run' of the user's: the number of its process, or its workload "+
		"as NAME or NAMESPACE/NAME")
	cmd.MarkFlagsMutuallyExclusive("run", "socket")
}

// runRef is an asker as the value of --run.
type runRef asker

func (*runRef) String() string { return "" }
func (*runRef) Type() string   { return "PROCESS|NAME" }

func (r *runRef) Set(ref string) (err error) {
	r.socket, err = findRun(runBases(os.Getenv), ref)
	return err
}

func (a *asker) client() *admin.PodClient { return admin.NewPodClient(a.socket) }

func connectionsCommand() *cobra.Command {
	return listCommand(false, &cobra.Command{
		Use: "connections", Short: "list the live connections of the pods: who with whom, over which tunnel, how much",
		Args: noArgs,
	})
}

func flowsCommand() *cobra.Command {
	return listCommand(true, &cobra.Command{
		Use: "flows", Short: "list the connections that have ended lately, with outcome and reason", Args: noArgs,
		Long: "Lists connections that have ended, the newest last, as far as the daemon remembers them (ZTUN_FLOWS for " +
			"each pod).\n" +
			"Outcomes are success, denied (a policy said no, here or at the peer), failed (it never stood, for another " +
			"reason) and\n" +
			"cut (it stood, and ended in an error or because policy, a revocation or a drain cut it).",
	})
}

// listCommand completes a command that lists connections.
func listCommand(ended bool, cmd *cobra.Command) *cobra.Command {
	var a asker
	var o output
	var q admin.ConnectionQuery
	var follow bool
	var since time.Duration
	a.bind(cmd)
	a.bindRun(cmd)
	o.bind(cmd)
	f := cmd.Flags()
	f.StringVar(&q.Pod, "pod", "", "only of this pod: NAME or NAMESPACE/NAME")
	f.StringVar(&q.Peer, "peer", "",
		"only with this peer: an address, a prefix, or a part of its name, service or identity")
	f.StringVar(&q.Direction, "direction", "", "outbound, inbound or passthrough (inbound plaintext)")
	f.StringVar(&q.Sort, "sort", "", "age (youngest first, the default), bytes, sent, received, pod or peer")
	f.IntVar(&q.Limit, "limit", 1000, "list so many at most")
	f.BoolVarP(&follow, "watch", "w", false, "go on and show what changes")
	columns := connectionColumns
	if ended {
		columns = flowColumns
		f.StringVar(&q.Outcome, "outcome", "", "success, denied, failed, cut, or bad for all but success")
		f.DurationVar(&since, "since", 0, "only what has ended within this time, such as 10m")
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		now := time.Now()
		if since > 0 {
			q.Since = now.Add(-since)
		}
		total := 0
		w := watching[admin.Connection]{
			out: cmd.OutOrStdout(), o: &o, every: time.Second, columns: columns(time.Now),
			key: func(c admin.Connection) string {
				return fmt.Sprint(c.Pod, c.Direction, c.Source.Address, c.Destination.Address, c.Start.UnixNano())
			},
			text: func(c admin.Connection) string { return c.State },
			fetch: func(ctx context.Context) (_ []admin.Connection, err error) {
				var l admin.Connections
				if ended {
					l, err = a.client().Flows(ctx, q)
					slices.Reverse(l.Connections) // as a log
				} else {
					l, err = a.client().Connections(ctx, q)
				}
				total = l.Total
				return l.Connections, err
			},
		}
		if !ended {
			w.gone = func(c admin.Connection) admin.Connection { c.State = "gone"; return c }
		}
		err := w.run(cmd.Context(), follow, func(all []admin.Connection) any {
			return admin.Connections{Connections: all, Total: total}
		})
		if err == nil && !follow && !o.structured() && total > q.Limit && q.Limit > 0 {
			fmt.Fprintf(cmd.ErrOrStderr(), "%d of %d are shown: see --limit, --pod and --peer\n", q.Limit, total)
		}
		return err
	}
	return cmd
}

type connColumn = column[admin.Connection]

func connectionColumns(now func() time.Time) []connColumn {
	state := connColumn{head: "STATE", cell: func(c admin.Connection) string { return c.State }}
	return slices.Concat(sideColumns[:3], []connColumn{state}, sideColumns[3:], []connColumn{
		{head: "AGE", cell: func(c admin.Connection) string { return words.Span(c.Age(now())) }},
		{head: "TUNNEL", cell: func(c admin.Connection) string {
			if c.Memory {
				return "in memory"
			}
			if !c.Tunnel.Local.IsValid() {
				return ""
			}
			return c.Tunnel.Local.String() + "-" + c.Tunnel.Remote.String()
		}},
	}, wideColumns)
}

func flowColumns(func() time.Time) []connColumn {
	end := connColumn{head: "END", cell: func(c admin.Connection) string { return c.End.Local().Format("15:04:05.000") }}
	return slices.Concat([]connColumn{end}, sideColumns, []connColumn{
		{head: "TOOK", cell: func(c admin.Connection) string { return words.Span(c.Age(c.End)) }},
		{head: "OUTCOME", cell: func(c admin.Connection) string { return c.Outcome }},
		{head: "REASON", cell: func(c admin.Connection) string { return c.Reason }},
		{head: "TUNNEL", wide: true, cell: func(c admin.Connection) string {
			if c.Memory {
				return "in memory"
			}
			return ""
		}},
	}, wideColumns)
}

// sideColumns are common to both lists.
var sideColumns = []connColumn{
	{head: "POD", cell: func(c admin.Connection) string { return c.Pod }},
	{head: "DIRECTION", cell: func(c admin.Connection) string { return c.Direction }},
	{head: "PROTOCOL", cell: func(c admin.Connection) string { return c.Protocol }},
	{head: "SOURCE", cell: func(c admin.Connection) string { return c.Source.Address.String() }},
	{head: "DESTINATION", cell: func(c admin.Connection) string {
		if c.Called.IsValid() {
			return c.Called.String() // what the application called; wide has the rest
		}
		return c.Destination.Address.String()
	}},
	{head: "FROM", cell: func(c admin.Connection) string { return partyText(&c.Source) }},
	{head: "TO", cell: func(c admin.Connection) string { return partyText(&c.Destination) }},
	{head: "SENT", cell: func(c admin.Connection) string { return bytesText(c.Sent) }},
	{head: "RECEIVED", cell: func(c admin.Connection) string { return bytesText(c.Received) }},
}

// wideColumns are those of -o wide.
var wideColumns = []connColumn{
	{head: "SERVICE", wide: true, cell: func(c admin.Connection) string { return c.Service }},
	{head: "ENDPOINT", wide: true, cell: func(c admin.Connection) string { return c.Destination.Address.String() }},
	{head: "AUTHORITY", wide: true, cell: func(c admin.Connection) string { return c.Authority }},
	{head: "SOURCE-IDENTITY", wide: true, cell: func(c admin.Connection) string { return c.Source.Identity }},
	{head: "DESTINATION-IDENTITY", wide: true, cell: func(c admin.Connection) string { return c.Destination.Identity }},
	{head: "FLAG", wide: true, cell: func(c admin.Connection) string { return c.Flag }},
}

// partyText is who a side is: the identity that its certificate proves as namespace/account; what is only said of a
// plaintext address is in brackets.
func partyText(s *admin.Side) string {
	if _, rest, ok := strings.Cut(s.Identity, "/ns/"); ok {
		return strings.Replace(rest, "/sa/", "/", 1)
	}
	if s.Identity != "" {
		return s.Identity
	}
	if s.Workload != "" {
		return "(" + s.Namespace + "/" + s.Workload + ")"
	}
	return ""
}
