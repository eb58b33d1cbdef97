package proc

import (
	"errors"
	"io/fs"
	"os"
	"testing"
	"testing/fstest"
	"time"

	"github.com/google/go-cmp/cmp"
)

const statLine = "4242 (tricky) S ) R 17 4242 4242 0 -1 4194560 1 2 3 4 250 50 7 3 20 0 9 0 123 456 789\n"

func TestParseStat(t *testing.T) {
	got, err := ParseStat(statLine)
	if err != nil {
		t.Fatal(err)
	}
	want := Stat{PID: 4242, PPID: 17, Comm: "tricky) S ", CPU: 3 * time.Second, Children: 100 * time.Millisecond}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	for _, in := range []string{"", "4242", "x (a) R 1", "1 (a) R 1 2 3", "1 )a( R",
		"1 (a) R x 4242 4242 0 -1 4194560 1 2 3 4 250 50 7 3 20",
		"1 (a) R 1 4242 4242 0 -1 4194560 1 2 3 4 -250 50 7 3 20",
		"1 (a) R 1 4242 4242 0 -1 4194560 1 2 3 4 9223372036854775807 50 7 3 20"} {
		if st, err := ParseStat(in); err == nil {
			t.Errorf("%q: %+v, want an error", in, st)
		}
	}
}

func TestParseStatus(t *testing.T) {
	got, err := ParseStatus("Name:\tztun\nVmHWM:\t  2048 kB\nVmRSS:\t   1024 kB\nRssAnon:\t 512 kB\nThreads:\t9\n")
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(Mem{RSS: 1 << 20, Peak: 2 << 20, Anon: 512 << 10, Threads: 9}, got); d != "" {
		t.Error(d)
	}
	for _, in := range []string{"", "Name:\tzombie\n", "VmRSS: x kB\n", "VmRSS: -1 kB\n",
		"VmRSS: 9223372036854775807 kB\n"} {
		if _, err := ParseStatus(in); err == nil {
			t.Errorf("%q: no error", in)
		}
	}
}

func TestParseCPUTimes(t *testing.T) {
	got, err := ParseCPUTimes("cpu  100 1 200 1000 50 3 6 20 0 0\ncpu0 1 2 3 4 5 6 7 8 9 0\n")
	if err != nil {
		t.Fatal(err)
	}
	want := CPUTimes{Busy: 3100 * time.Millisecond, Idle: 10500 * time.Millisecond, Steal: 200 * time.Millisecond}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff(CPUTimes{}, got.Sub(got)); d != "" {
		t.Error(d)
	}
	for _, in := range []string{"", "cpu 1 2", "cpu0 1 2 3 4 5 6 7 8\n", "cpu x 2 3 4 5 6 7 8\n"} {
		if _, err := ParseCPUTimes(in); err == nil {
			t.Errorf("%q: no error", in)
		}
	}
}

func TestParseModelAndMeminfo(t *testing.T) {
	if got := ParseModel("processor\t: 0\nmodel name\t: AMD EPYC\n"); got != "AMD EPYC" {
		t.Error(got)
	}
	if got := ParseModel("CPU part : 0xd0c\n"); got != "unknown" {
		t.Error(got)
	}
	got := ParseMeminfo("MemTotal:  16 kB\nSlab:\t  4 kB\nHugePages_Total:       0\nBad: x kB\n")
	if d := cmp.Diff(map[string]int64{"MemTotal": 16 << 10, "Slab": 4 << 10}, got); d != "" {
		t.Error(d)
	}
}

func TestForeign(t *testing.T) {
	s := time.Second
	all := []Stat{
		{PID: 1, CPU: 1 * s},                                 // foreign
		{PID: 2, CPU: 100 * s, Kernel: true},                 // nobody's
		{PID: 3, PPID: 2, CPU: 100 * s, Kernel: true},        //
		{PID: 10, PPID: 1, CPU: 1000 * s},                    // us
		{PID: 11, PPID: 10, CPU: 1000 * s},                   // our daemon
		{PID: 12, PPID: 11, CPU: 1000 * s},                   // its child
		{PID: 20, PPID: 1, CPU: 2 * s, Children: 3 * s},      // a build with ended compilers
		{PID: 21, PPID: 20, CPU: 4 * s},                      // a compiler
		{PID: 30, PPID: 31, CPU: 5 * s}, {PID: 31, PPID: 30}, // a ring, as a torn table may show
	}
	if got := Foreign(all, 10); got != 15*s {
		t.Errorf("foreign %v, want 15s", got)
	}
}

func TestFS(t *testing.T) {
	p := FS{fstest.MapFS{
		"4242/stat":   {Data: []byte(statLine)},
		"4242/status": {Data: []byte("VmRSS: 4 kB\n")},
		"7/status":    {Data: []byte("a process that ended while we looked\n")},
		"stat":        {Data: []byte("cpu 1 0 0 0 0 0 0 0 0 0\n")},
		"meminfo":     {Data: []byte("Slab: 1 kB\n")},
		"self/stat":   {Data: []byte("no number")},
	}}
	all, err := p.All()
	if err != nil || len(all) != 1 || all[0].PID != 4242 {
		t.Errorf("%+v %v", all, err)
	}
	if m, err := p.Mem(4242); err != nil || m.RSS != 4096 {
		t.Error(m, err)
	}
	if _, err := p.Mem(5); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if c, err := p.CPUTimes(); err != nil || c.Busy != tick {
		t.Error(c, err)
	}
	if p.Slab() != 1024 {
		t.Error(p.Slab())
	}
}

// TestHost reads the real thing: this process has spent some time and holds some memory.
func TestHost(t *testing.T) {
	p, pid := Host(), os.Getpid()
	st, err := p.Stat(pid)
	if err != nil || st.PID != pid || st.PPID != os.Getppid() || st.Kernel {
		t.Errorf("%+v %v", st, err)
	}
	m, err := p.Mem(pid)
	if err != nil || m.RSS < 1<<20 || m.Peak < m.RSS || m.Threads < 1 {
		t.Errorf("%+v %v", m, err)
	}
	all, err := p.All()
	if err != nil || len(all) < 1 {
		t.Error(all, err)
	}
	if c, err := p.CPUTimes(); err != nil || c.Busy <= 0 {
		t.Error(c, err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(statLine)
	f.Add("VmRSS: 12 kB\ncpu 1 2 3 4 5 6 7 8\n")
	f.Add("1 (() R 1 4242 4242 0 -1 4194560 1 2 3 4 0 0 0 0 20")
	f.Fuzz(func(t *testing.T, in string) {
		if st, err := ParseStat(in); err == nil && (st.CPU < 0 || st.Children < 0) {
			t.Errorf("%+v", st)
		}
		if m, err := ParseStatus(in); err == nil && (m.RSS < 0 || m.Peak < 0) {
			t.Errorf("%+v", m)
		}
		if c, err := ParseCPUTimes(in); err == nil && (c.Busy < 0 || c.Idle < 0 || c.Steal < 0) {
			t.Errorf("%+v", c)
		}
		ParseMeminfo(in)
		ParseModel(in)
	})
}
