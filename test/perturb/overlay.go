package main

import (
	_ "embed"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

//go:embed testdata/runtime.go.txt
var runtimePart string

// edit replaces one text of a file of the standard library, which is in it exactly once.
type edit struct{ file, old, new string }

// edits put a call of runtime.perturb wherever a goroutine lets another one run or learns what another one did: there,
// and nowhere else, it is open which of the two goes on first. A delay behind what wakes another one (Unlock, Signal,
// close, send, go, a write) lets the other one win; one in front of a lock or behind a receive lets it lose.
func edits() []edit {
	const in, out = "runtime_perturb()", "defer runtime_perturb()"
	first := func(file, fn, do string) edit { return edit{file, fn + " {\n", fn + " {\n\t" + do + "\n"} }
	behind := func(file, text, add string) edit { return edit{file, text, text + add} }
	chans := func(old, new string) edit { return edit{"runtime/chan.go", old, new} }
	const selectgo = "(cas0 *scase, order0 *uint16, pc0 *uintptr, nsends, nrecvs int, block bool) (int, bool) {\n"
	return []edit{
		first("sync/mutex.go", "func (m *Mutex) Lock()", in),
		first("sync/mutex.go", "func (m *Mutex) Unlock()", out),
		first("sync/rwmutex.go", "func (rw *RWMutex) RLock()", in),
		first("sync/rwmutex.go", "func (rw *RWMutex) RUnlock()", out),
		first("sync/rwmutex.go", "func (rw *RWMutex) Lock()", in),
		first("sync/rwmutex.go", "func (rw *RWMutex) Unlock()", out),
		first("sync/cond.go", "func (c *Cond) Signal()", out),
		first("sync/cond.go", "func (c *Cond) Broadcast()", out),
		first("sync/waitgroup.go", "func (wg *WaitGroup) Done()", out),
		behind("sync/runtime.go", "// defined in package runtime\n", "func runtime_perturb()\n"),

		first("internal/poll/fd_mutex.go", "func (fd *FD) readUnlock()", out),
		first("internal/poll/fd_mutex.go", "func (fd *FD) writeUnlock()", out),
		behind("internal/poll/fd_poll_runtime.go", "func runtime_pollServerInit()\n", "func runtime_perturb()\n"),

		behind("runtime/chan.go", "\tchansend(c, elem, true, sys.GetCallerPC())\n", "\tperturb()\n"),
		chans("\treturn chansend(c, elem, false, sys.GetCallerPC())\n",
			"\tselected = chansend(c, elem, false, sys.GetCallerPC())\n\tperturb()\n\treturn selected\n"),
		behind("runtime/chan.go", "\tchanrecv(c, elem, true)\n", "\tperturb()\n"),
		behind("runtime/chan.go", "\t_, received = chanrecv(c, elem, true)\n", "\tperturb()\n"),
		chans("\treturn chanrecv(c, elem, false)\n",
			"\tselected, received = chanrecv(c, elem, false)\n\tperturb()\n\treturn selected, received\n"),
		behind("runtime/chan.go", "func closechan(c *hchan) {\n",
			"\tcloseOnly(c)\n\tperturb()\n}\n\nfunc closeOnly(c *hchan) {\n"),
		behind("runtime/select.go", "func selectgo"+selectgo,
			"\tcasi, recvOK := selectOnly(cas0, order0, pc0, nsends, nrecvs, block)\n\tperturb()\n"+
				"\treturn casi, recvOK\n}\n\nfunc selectOnly"+selectgo),
		{
			"runtime/proc.go", "\t\trunqput(pp, newg, true)\n\n\t\tif mainStarted {\n\t\t\twakep()\n\t\t}\n\t})\n}\n",
			"\t\trunqput(pp, newg, true)\n\n\t\tif mainStarted {\n\t\t\twakep()\n\t\t}\n\t})\n\tperturb()\n}\n",
		},
		// As under the race detector: who was woken last need not run first.
		{"runtime/proc.go", "const randomizeScheduler = raceenabled\n", "const randomizeScheduler = true\n"},
	}
}

// writeOverlay writes the changed files and the list of them, as go build -overlay reads it, into dir, and returns the
// list's path. goroot is where the standard library's source is. The error says which text was not found: then this
// Go's library is another one than the edits are for.
func writeOverlay(goroot, dir string) (string, error) {
	src := filepath.Join(goroot, "src")
	texts := map[string]string{"runtime/perturb.go": runtimePart}
	for _, e := range edits() {
		text, ok := texts[e.file]
		if !ok {
			b, err := os.ReadFile(filepath.Join(src, e.file))
			if err != nil {
				return "", err
			}
			text = string(b)
		}
		if n := strings.Count(text, e.old); n != 1 {
			return "", fmt.Errorf("%s of this Go has %d times, not once: %q", e.file, n, e.old)
		}
		texts[e.file] = strings.Replace(text, e.old, e.new, 1)
	}
	replace := map[string]string{}
	for file, text := range texts {
		to := filepath.Join(dir, strings.ReplaceAll(file, "/", "_"))
		if err := os.WriteFile(to, []byte(text), 0o600); err != nil {
			return "", err
		}
		replace[filepath.Join(src, file)] = to
	}
	b, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return "", err
	}
	list := filepath.Join(dir, "overlay.json")
	return list, os.WriteFile(list, b, 0o600)
}
