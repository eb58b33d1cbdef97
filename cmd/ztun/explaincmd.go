package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"ztun/proxy"
)

func explainCommand() *cobra.Command {
	var a asker
	var o output
	var from, to, identity string
	var inbound, plaintext, probe bool
	cmd := &cobra.Command{
		Use:   "explain POD DST:PORT | --from POD --to WORKLOAD:PORT | --inbound POD PORT --from WHO",
		Short: "say what would happen to a connection now, and why",
		Long: "Says what would happen to a connection now, and why: from the very decisions that are made for real ones, " +
			"step by step.\n" +
			"DST is an address or a name as the pod resolves it, POD a pod of this node (NAME or NAMESPACE/NAME), WORKLOAD " +
			"one of the mesh.\n" +
			"With --inbound it is about a connection that reaches PORT of the pod from WHO, an address or a workload: what it " +
			"proves to be is\n" +
			"the workload's identity, or --identity, or nothing (--plaintext). What policies at another node say is what this " +
			"node knows of them.\n\n" +
			"--probe really connects, by a CONNECT or a SYN and without any payload, and says at which step that failed. The " +
			"exit code is 1 then.",
		Example: "  ztun explain front-1 stock.shop:80\n  ztun explain --from front-1 --to shop/stock-1:8080 --probe\n  " +
			"ztun explain --inbound stock-1 8080 --from shop/front-1",
		RunE: func(cmd *cobra.Command, args []string) error {
			q, pod, err := explainQuery(cmd, args, from, to, inbound)
			if err != nil {
				return err
			}
			for name, on := range map[string]bool{"probe": probe, "plaintext": plaintext} {
				if on {
					q.Set(name, "1")
				}
			}
			if identity != "" {
				q.Set("identity", identity)
			}
			pods, err := a.client().List(cmd.Context())
			if err != nil {
				return err
			}
			found, err := findPod(pods, "default", pod)
			if err != nil {
				return err
			}
			q.Set("pod", refOf(found.PodSpec).String())
			body, err := a.client().Get(cmd.Context(), explainPath, q)
			if err != nil {
				return err
			}
			defer body.Close()
			var x proxy.Explanation
			if err := json.NewDecoder(body).Decode(&x); err != nil {
				return fmt.Errorf("unexpected answer of the daemon: %w", err)
			}
			if o.structured() {
				err = o.write(cmd.OutOrStdout(), &x)
			} else {
				err = writeExplanation(cmd.OutOrStdout(), &o, &x)
			}
			if err == nil && x.Probe != nil && !x.Probe.OK {
				err = fmt.Errorf("the probe failed at the step %q: %s", x.Probe.Step, cellOf(x.Probe.Error))
			}
			return err
		},
		ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			if len(args) > 0 || from != "" && !inbound {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return podNames(cmd.Context(), a.client(), "default"), cobra.ShellCompDirectiveNoFileComp
		},
	}
	a.bind(cmd)
	a.bindRun(cmd)
	o.bind(cmd)
	f := cmd.Flags()
	f.StringVar(&from, "from", "", "the pod that connects; with --inbound an address or a workload")
	f.StringVar(&to, "to", "", "WORKLOAD:PORT that it connects to")
	f.BoolVar(&inbound, "inbound", false, "explain a connection that reaches the pod")
	f.StringVar(&identity, "identity", "", "identity that an inbound connection proves (spiffe://...)")
	f.BoolVar(&plaintext, "plaintext", false, "the inbound connection comes without a tunnel")
	f.BoolVar(&probe, "probe", false, "really connect, without payload")
	return cmd
}

// explainQuery reads the three forms of the command.
func explainQuery(cmd *cobra.Command, args []string, from, to string, inbound bool) (q url.Values, pod string,
	err error) {
	q = url.Values{}
	switch {
	case inbound:
		if len(args) != 2 || from == "" || to != "" {
			return nil, "", usageError(cmd, errors.New("ztun explain --inbound wants a POD, a PORT and --from"))
		}
		if _, err := strconv.ParseUint(strings.TrimPrefix(args[1], ":"), 10, 16); err != nil {
			return nil, "", usageError(cmd, fmt.Errorf("%q is not a PORT", args[1]))
		}
		q.Set("inbound", "1")
		q.Set("from", from)
		q.Set("to", ":"+strings.TrimPrefix(args[1], ":"))
		return q, args[0], nil
	case from != "" || to != "":
		if len(args) != 0 || from == "" || to == "" {
			return nil, "",
				usageError(cmd, errors.New("ztun explain wants both --from POD and --to WORKLOAD:PORT, and nothing else"))
		}
		q.Set("workload", "1")
		pod = from
	case len(args) != 2:
		return nil, "", usageError(cmd, errors.New("ztun explain wants a POD and DST:PORT"))
	default:
		pod, to = args[0], args[1]
	}
	if _, _, err := splitTarget(to); err != nil {
		return nil, "", usageError(cmd, err)
	}
	q.Set("to", to)
	return q, pod, nil
}

// writeExplanation shows an explanation to people.
func writeExplanation(w io.Writer, o *output, x *proxy.Explanation) error {
	var b strings.Builder
	where := "to"
	if x.Direction != "outbound" {
		where = "reaching"
	}
	fmt.Fprintf(&b, "%s connection of pod %s %s %s\n\n", x.Direction, x.Pod, where, x.Called)
	for _, s := range x.Steps {
		mark := "ok"
		if !s.OK {
			mark = "NO"
		}
		fmt.Fprintf(&b, "%s  %-11s  %s\n", mark, s.Step, cellOf(s.Text))
		if len(s.Candidates) > 0 {
			if err := indented(&b, o, candidateColumns, s.Candidates); err != nil {
				return err
			}
		}
		if len(s.Policies) > 0 {
			if err := indented(&b, o, policyColumns, s.Policies); err != nil {
				return err
			}
		}
	}
	verdict := "goes"
	if x.Refused {
		verdict = "REFUSED"
	}
	fmt.Fprintf(&b, "\n%s: %s\n", verdict, cellOf(x.Outcome))
	if x.Error != "" {
		fmt.Fprintf(&b, "access log: error=%q\n", x.Error)
	}
	if p := x.Probe; p != nil {
		fmt.Fprintf(&b, "probe: %s (%.1f ms)\n", cellOf(p.Outcome), p.Millis)
		if !p.OK {
			fmt.Fprintf(&b, "probe: failed at the step %q: %s\n", p.Step, cellOf(p.Error))
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// indented writes a table below a step.
func indented[T any](b *strings.Builder, o *output, columns []column[T], rows []T) error {
	var t strings.Builder
	if err := newTable(&t, o, columns).write(rows); err != nil {
		return err
	}
	for line := range strings.Lines(t.String()) {
		b.WriteString("                 " + strings.TrimRight(line, " \n") + "\n")
	}
	return nil
}

var candidateColumns = []column[proxy.ExplanationCandidate]{
	{head: "ENDPOINT", cell: func(c proxy.ExplanationCandidate) string { return c.UID }},
	{head: "ADDRESS", cell: func(c proxy.ExplanationCandidate) string {
		if !c.Address.IsValid() {
			return ""
		}
		return c.Address.String()
	}},
	{head: "HEALTH", cell: func(c proxy.ExplanationCandidate) string { return c.Health }},
	{head: "LOCALITY", cell: func(c proxy.ExplanationCandidate) string { return c.Locality }},
	{head: "NODE", cell: func(c proxy.ExplanationCandidate) string { return c.Node }},
	{head: "RANK", cell: func(c proxy.ExplanationCandidate) string { return strconv.Itoa(c.Rank) }},
	{head: "WEIGHT", cell: func(c proxy.ExplanationCandidate) string { return strconv.FormatUint(uint64(c.Weight), 10) }},
	{head: "NOTE", cell: func(c proxy.ExplanationCandidate) string {
		if c.Chosen {
			return "drawn"
		}
		return c.Excluded
	}},
}

var policyColumns = []column[proxy.ExplanationPolicy]{
	{head: "POLICY", cell: func(p proxy.ExplanationPolicy) string { return p.Policy }},
	{head: "ACTION", cell: func(p proxy.ExplanationPolicy) string {
		if p.DryRun {
			return p.Action + " (dry run)"
		}
		return p.Action
	}},
	{head: "SCOPE", cell: func(p proxy.ExplanationPolicy) string { return p.Scope }},
	{head: "MATCHES", cell: func(p proxy.ExplanationPolicy) string {
		switch {
		case p.Missing:
			return "not loaded"
		case p.Decides:
			return "yes, decides"
		case p.Matches:
			return "yes"
		}
		return "no"
	}},
	{head: "RULE", cell: func(p proxy.ExplanationPolicy) string {
		if p.Rule == 0 {
			return ""
		}
		return fmt.Sprintf("%d: %s", p.Rule, p.Text)
	}},
}
