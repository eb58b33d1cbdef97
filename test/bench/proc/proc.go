package proc

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"
)

const tick = 10 * time.Millisecond

// Stat is what we use of /proc/PID/stat (proc_pid_stat(5)).
type Stat struct {
	PID, PPID int
	Comm      string
	CPU       time.Duration // user and system time of all threads of the process, dead threads included
	Children  time.Duration // the same of children that ended and were waited for, and theirs
	Kernel    bool          // a kernel thread
}

// ParseStat reads one line of /proc/PID/stat. The command name may hold blanks and parentheses.
func ParseStat(s string) (Stat, error) {
	open, end := strings.IndexByte(s, '('), strings.LastIndexByte(s, ')')
	if open < 0 || end < open {
		return Stat{}, fmt.Errorf("proc: stat %.60q: no command name", s)
	}
	var st Stat
	var err error
	if st.PID, err = strconv.Atoi(strings.TrimSpace(s[:open])); err != nil {
		return Stat{}, fmt.Errorf("proc: stat %.60q: %w", s, err)
	}
	st.Comm = s[open+1 : end]
	// f[0] is field 3 of the manual page, the state.
	f := strings.Fields(s[end+1:])
	if len(f) < 15 {
		return Stat{}, fmt.Errorf("proc: stat %.60q: %d fields after the name, want 15 and more", s, len(f))
	}
	if st.PPID, err = strconv.Atoi(f[1]); err != nil {
		return Stat{}, fmt.Errorf("proc: stat %.60q: ppid: %w", s, err)
	}
	var t [4]time.Duration // utime, stime, cutime, cstime: fields 14 to 17
	for i := range t {
		n, err := strconv.ParseInt(f[11+i], 10, 64)
		if err != nil || n < 0 || n > int64(1<<62/tick) {
			return Stat{}, fmt.Errorf("proc: stat %.60q: time %q", s, f[11+i])
		}
		t[i] = time.Duration(n) * tick
	}
	st.CPU, st.Children = t[0]+t[1], t[2]+t[3]
	st.Kernel = st.PID == 2 || st.PPID == 2
	return st, nil
}

// Mem is what we use of /proc/PID/status, in bytes.
type Mem struct {
	RSS, Peak int64 // resident now, and the most it ever was
	Anon      int64 // resident anonymous memory: heap and stacks, without the program's own pages
	Threads   int
}

// ParseStatus reads /proc/PID/status. RSS is required (a zombie has none); what else is missing stays zero.
func ParseStatus(s string) (Mem, error) {
	var m Mem
	found := false
	for line := range strings.Lines(s) {
		k, v, ok := strings.Cut(line, ":")
		if !ok {
			continue
		}
		v = strings.TrimSpace(v)
		var err error
		switch k {
		case "VmRSS":
			m.RSS, err = parseKB(v)
			found = true
		case "VmHWM":
			m.Peak, err = parseKB(v)
		case "RssAnon":
			m.Anon, err = parseKB(v)
		case "Threads":
			m.Threads, err = strconv.Atoi(v)
		}
		if err != nil {
			return Mem{}, fmt.Errorf("proc: status: %s: %w", k, err)
		}
	}
	if !found {
		return Mem{}, errors.New("proc: status: no VmRSS")
	}
	return m, nil
}

// parseKB reads "123 kB" into bytes.
func parseKB(v string) (int64, error) {
	n, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(v, "kB")), 10, 64)
	if err != nil {
		return 0, err
	}
	if n < 0 || n > 1<<50 {
		return 0, fmt.Errorf("%q out of range", v)
	}
	return n << 10, nil
}

// ParseMeminfo reads /proc/meminfo into bytes by name; lines without kB are left out.
func ParseMeminfo(s string) map[string]int64 {
	m := make(map[string]int64)
	for line := range strings.Lines(s) {
		k, v, ok := strings.Cut(line, ":")
		v = strings.TrimSpace(v)
		if !ok || !strings.HasSuffix(v, "kB") {
			continue
		}
		if n, err := parseKB(v); err == nil {
			m[k] = n
		}
	}
	return m
}

// CPUTimes is the first line of /proc/stat: the whole machine since boot.
type CPUTimes struct {
	Busy, Idle, Steal time.Duration // Busy: user, nice, system, interrupts; Idle includes waiting for disks
}

// Sub returns what passed since b.
func (a CPUTimes) Sub(b CPUTimes) CPUTimes {
	return CPUTimes{a.Busy - b.Busy, a.Idle - b.Idle, a.Steal - b.Steal}
}

// ParseCPUTimes reads /proc/stat.
func ParseCPUTimes(s string) (CPUTimes, error) {
	for line := range strings.Lines(s) {
		f := strings.Fields(line)
		if len(f) < 9 || f[0] != "cpu" {
			continue
		}
		var t [8]time.Duration // user nice system idle iowait irq softirq steal
		for i := range t {
			n, err := strconv.ParseInt(f[i+1], 10, 64)
			if err != nil || n < 0 || n > int64(1<<60/tick) {
				return CPUTimes{}, fmt.Errorf("proc: stat: %q", f[i+1])
			}
			t[i] = time.Duration(n) * tick
		}
		return CPUTimes{Busy: t[0] + t[1] + t[2] + t[5] + t[6], Idle: t[3] + t[4], Steal: t[7]}, nil
	}
	return CPUTimes{}, errors.New("proc: stat: no line for all processors")
}

// ParseModel returns the processor's name of /proc/cpuinfo, "unknown" when it has none (ARM).
func ParseModel(s string) string {
	for line := range strings.Lines(s) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
			return strings.TrimSpace(v)
		}
	}
	return "unknown"
}

// FS reads a /proc.
type FS struct{ fs.FS }

// Host is the machine's own /proc. A namespace of the network kind sees the same processes.
func Host() FS { return FS{os.DirFS("/proc")} }

func (p FS) text(name string) (string, error) {
	b, err := fs.ReadFile(p.FS, name)
	return string(b), err
}

// Stat reads one process's CPU time. A process that is gone is an error that is fs.ErrNotExist.
func (p FS) Stat(pid int) (Stat, error) {
	s, err := p.text(strconv.Itoa(pid) + "/stat")
	if err != nil {
		return Stat{}, err
	}
	return ParseStat(s)
}

// Mem reads one process's memory.
func (p FS) Mem(pid int) (Mem, error) {
	s, err := p.text(strconv.Itoa(pid) + "/status")
	if err != nil {
		return Mem{}, err
	}
	return ParseStatus(s)
}

// CPUTimes reads the machine's.
func (p FS) CPUTimes() (CPUTimes, error) {
	s, err := p.text("stat")
	if err != nil {
		return CPUTimes{}, err
	}
	return ParseCPUTimes(s)
}

// Slab is the kernel's memory for objects such as sockets, in bytes; 0 if it cannot be read.
func (p FS) Slab() int64 {
	s, err := p.text("meminfo")
	if err != nil {
		return 0
	}
	return ParseMeminfo(s)["Slab"]
}

// All reads every process. Those that end meanwhile are left out.
func (p FS) All() ([]Stat, error) {
	es, err := fs.ReadDir(p.FS, ".")
	if err != nil {
		return nil, err
	}
	var out []Stat
	for _, e := range es {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if st, err := p.Stat(pid); err == nil {
			out = append(out, st)
		}
	}
	return out, nil
}

// Foreign sums the CPU time of all processes that neither descend from root (root included) nor are kernel threads. A
// process's ended children count with it, so that the difference of two sums holds the compilers that came and went
// in between; the sum is only good for differences.
func Foreign(all []Stat, root int) time.Duration {
	parent := make(map[int]int, len(all))
	for _, st := range all {
		parent[st.PID] = st.PPID
	}
	var sum time.Duration
	for _, st := range all {
		if st.Kernel {
			continue
		}
		ours := false
		// Bounded by the number of processes: a damaged table with a ring in it must not hold us.
		for pid, n := st.PID, 0; pid != 0 && n <= len(all); pid, n = parent[pid], n+1 {
			if pid == root {
				ours = true
				break
			}
		}
		if !ours {
			sum += st.CPU + st.Children
		}
	}
	return sum
}
