package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"ztun/tun/capture"
)

func captureCommand() *cobra.Command {
	var a asker
	var count uint64
	var duration time.Duration
	var snap int
	cmd := &cobra.Command{
		Use:   "capture POD [FILTER...]",
		Short: "write what a pod sends and receives, in the clear, as pcapng",
		Long: "Writes to its output, as pcapng for tshark and tcpdump, what the TUN device of a pod of this node carries: " +
			"the application's\n" +
			"side of its connections, in the clear; between the nodes only TLS is to be seen. The first packet of each " +
			"connection has a comment\n" +
			"with both identities and what was decided. It ends after --count packets, after --duration, or when it is " +
			"interrupted. Packets\n" +
			"may be larger than the MTU, and their checksums not filled in: that is left to each other by both ends of the " +
			"device.\n\n" +
			"FILTER is a few of tcpdump's words: tcp, udp, icmp, host ADDRESS, net PREFIX, port PORT, the last three with src " +
			"or dst in front,\n" +
			"not, and, or, and parentheses. What the reader is too slow for is left out; how much is said at the end of the " +
			"file.",
		Example: "  ztun capture front-1 > front.pcapng\n  ztun capture shop/front-1 tcp and dst port 80 --duration 10s | " +
			"tshark -r -",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageError(cmd, errors.New("ztun capture wants the name of a POD"))
			}
			if _, err := capture.ParseFilter(strings.Join(args[1:], " ")); err != nil {
				return usageError(cmd, err)
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if terminalRows(cmd.OutOrStdout()) > 0 {
				return errors.New("a capture is no text for a terminal: redirect it, > FILE.pcapng or | tshark -r -")
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			pods, err := a.client().List(ctx)
			if err != nil {
				return err
			}
			pod, err := findPod(pods, "default", args[0])
			if err != nil {
				return err
			}
			q := url.Values{"pod": {refOf(pod.PodSpec).String()}, "filter": {strings.Join(args[1:], " ")},
				"snaplen": {strconv.Itoa(snap)}}
			if count > 0 {
				q.Set("count", strconv.FormatUint(count, 10))
			}
			if duration > 0 {
				q.Set("seconds", strconv.Itoa(int((duration+time.Second-1)/time.Second)))
			}
			body, err := a.client().Get(ctx, capturePath, q)
			if err != nil {
				return err
			}
			defer body.Close()
			fmt.Fprintf(cmd.ErrOrStderr(), "capturing what pod %s sends and receives; Ctrl-C ends it\n", q.Get("pod"))
			packets, dropped, err := copyBlocks(cmd.OutOrStdout(), body)
			if ctx.Err() != nil {
				err = nil // interrupted, as announced
			}
			fmt.Fprintf(cmd.ErrOrStderr(), "%d packets captured\n", packets)
			if dropped > 0 {
				fmt.Fprintf(cmd.ErrOrStderr(), "%d packets left out, the reader was too slow for them\n", dropped)
			}
			return err
		},
		ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			if len(args) > 0 {
				return []string{"tcp", "udp", "icmp", "host", "net", "port", "src", "dst", "not", "and", "or"},
					cobra.ShellCompDirectiveNoFileComp
			}
			return podNames(cmd.Context(), a.client(), "default"), cobra.ShellCompDirectiveNoFileComp
		},
	}
	a.bind(cmd)
	a.bindRun(cmd)
	f := cmd.Flags()
	f.Uint64VarP(&count, "count", "c", 0, "end after so many packets")
	f.DurationVar(&duration, "duration", 0, "end after this time, in whole seconds (at most, and by default, an hour)")
	f.IntVarP(&snap, "snaplen", "s", captureSnap, "keep so many bytes of each packet")
	return cmd
}

// copyBlocks copies whole blocks of pcapng, so that what was written is a file whenever it ends.
func copyBlocks(w io.Writer, r io.Reader) (packets, dropped uint64, err error) {
	const packet, stats = 6, 5
	buf := make([]byte, 8)
	for {
		if _, err := io.ReadFull(r, buf[:8]); err != nil {
			if err == io.EOF {
				err = nil
			}
			return packets, dropped, err
		}
		n := binary.LittleEndian.Uint32(buf[4:])
		if n < 12 || n > 1<<20 {
			return packets, dropped, fmt.Errorf("unexpected answer of the daemon: a block of %d bytes", n)
		}
		if int(n) > cap(buf) {
			buf = append(make([]byte, 0, n), buf[:8]...)
		}
		buf = buf[:n]
		if _, err := io.ReadFull(r, buf[8:]); err != nil {
			return packets, dropped, err
		}
		if _, err := w.Write(buf); err != nil {
			return packets, dropped, err
		}
		switch binary.LittleEndian.Uint32(buf) {
		case packet:
			packets++
		case stats:
			if n >= 32 {
				dropped = binary.LittleEndian.Uint64(buf[24:])
			}
		}
	}
}
