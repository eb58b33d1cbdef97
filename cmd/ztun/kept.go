package main

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"time"

	"ztun/cmd/supervise"
	"ztun/proxy/state"
)

// Listeners outlive this process where something keeps them (package fdstore): systemd, or our own supervisor.

// outlived says whether this process has anything to do with a store: `ztun run` and dedicated mode leave what they
// were started with to whoever it is for.
func (c *Config) outlived() bool {
	return !c.Mode.Rootless && !c.Mode.Dedicated && c.Mode.Workload == (state.WorkloadInfo{})
}

// keptFor is how long connections wait in the queues of an earlier life's listeners for the pods that those are of, at
// most. Where no node agent says in that time which pods there are, they are refused again, as without a store.
const keptFor = time.Minute

// expireKept ends that time.
func (d *daemon) expireKept(ctx context.Context) error {
	select {
	case <-time.After(keptFor):
		d.letGo("the node agent has not named all pods within a minute")
	case <-ctx.Done():
	}
	return nil
}

// letGo closes the listeners of an earlier life that no pod has taken.
func (d *daemon) letGo(why string) {
	if n := d.store.Sweep(); n > 0 {
		d.store.Flush()
		d.logger.Warn("listeners of an earlier run are let go of: connections that wait there are reset", "listeners", n,
			"reason", why)
	}
}

// superviseProxy is the supervisor: this process as the parent of one that is the proxy. It returns what to exit with.
func superviseProxy() int {
	runtime.LockOSThread() // see supervise.Run
	exe, err := ownProgram()
	if err != nil {
		fmt.Fprintln(os.Stderr, "ztun:", err)
		return exitFailure
	}
	// What package initialisation has needed is charged to us for as long as we live.
	return supervise.Run(supervise.Options{Path: exe, Args: os.Args, Env: os.Environ(), Started: forgetStart})
}
