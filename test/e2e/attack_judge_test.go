package e2e

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"ztun/test/load"
)

const (
	// attackFloor is what a p99 is never held to be below, and what the machine's own pauses may amount to where a p99
	// is judged by its growth.
	attackFloor = 5 * time.Millisecond
	// attackIdle is the part of the processors that must be left over where a p99 is judged by its growth: without it,
	// whoever queues waits.
	attackIdle = 0.1
	// attackStolen is the part of the processors that a hypervisor may have taken where any time is judged: it takes it
	// in pauses, and a processor that was away for 0.9 s (seen) holds up whoever ran on it, and the peer's
	// retransmissions after that.
	attackStolen = 0.02
	// attackCeiling is what a p99 may be on a machine that is its own, however busy: the loss of one SYN (1 s, RFC 6298)
	// and of the next. Who is shut out waits longer, or fails.
	attackCeiling = 3 * time.Second
	// attackPauses are what the machine's own p99 may amount to where a time is held against that ceiling.
	attackPauses = attackCeiling / 10
)

// seen is what the bystander saw in one phase, and what the machine had left.
type seen struct {
	load.BystanderResult
	processors
}

// processors is what became of the processors' time, in parts of 1.
type processors struct {
	Idle, Stolen float64
}

// quiet says whether times of this phase tell of ztun, and not of a machine that is busy with other things.
func (s seen) quiet() bool {
	return s.Machine.P99 <= ms(attackFloor) && s.Idle >= attackIdle && s.Stolen <= attackStolen
}

func (s seen) machine() string {
	return fmt.Sprintf("p99 %.2f ms, %.0f %% idle, %.0f %% stolen", s.Machine.P99, 100*s.Idle, 100*s.Stolen)
}

// verdict of one round.
type verdict int

const (
	fair     verdict = iota // the bystander is served as before
	unfair                  // it is not, on a quiet machine: another round decides
	unproven                // it is slower, and so is the machine: another round may tell
	shutOut                 // it is so slow that no machine explains it
)

// judge one round: the ratio of p99 beside the attack to that of calm (and of p50, where median is not 0) decides on
// a quiet machine, the ceiling on any that nobody else has.
func judge(calm, beside seen, ratio, median float64) (v verdict, why string) {
	p99 := max(grown(beside.Connects.P99, calm.Connects.P99), grown(beside.Echoes.P99, calm.Echoes.P99))
	p50 := max(grown(beside.Connects.P50, calm.Connects.P50), grown(beside.Echoes.P50, calm.Echoes.P50))
	why = fmt.Sprintf("p99 grew %.1f times (limit %.1f), p50 %.1f times (limit %.1f, 0 is none); the machine: %s, then %s",
		p99, ratio, p50, median, calm.machine(), beside.machine())
	switch {
	case max(beside.Connects.P99, beside.Echoes.P99) > ms(attackCeiling) && beside.Stolen <= attackStolen &&
		beside.Machine.P99 <= ms(attackPauses):
		return shutOut, why
	case p99 <= ratio && (median == 0 || p50 <= median):
		return fair, why
	case calm.quiet() && beside.quiet():
		return unfair, why
	}
	return unproven, why
}

// grown is one quantile over the other, in milliseconds, neither taken below the floor.
func grown(beside, calm float64) float64 {
	return max(beside, ms(attackFloor)) / max(calm, ms(attackFloor))
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// ticks of all processors since the machine's start.
type ticks struct{ idle, stolen, all uint64 }

func readTicks() (ticks, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return ticks{}, err
	}
	line, _, _ := strings.Cut(string(b), "\n")
	var user, nice, system, idle, iowait, irq, softirq, steal uint64
	if _, err := fmt.Sscanf(line, "cpu %d %d %d %d %d %d %d %d", &user, &nice, &system, &idle, &iowait, &irq, &softirq,
		&steal); err != nil {
		return ticks{}, fmt.Errorf("/proc/stat: %w: %q", err, line)
	}
	return ticks{idle + iowait, steal, user + nice + system + idle + iowait + irq + softirq + steal}, nil
}

// since an earlier reading.
func (t ticks) since(before ticks) processors {
	all := float64(max(1, t.all-before.all))
	return processors{Idle: float64(t.idle-before.idle) / all, Stolen: float64(t.stolen-before.stolen) / all}
}

// TestJudge: growth decides where the machine is quiet in both phases, the ceiling everywhere.
func TestJudge(t *testing.T) {
	phase := func(p50, p99, machine, idle float64) seen {
		l := load.Latency{P50: p50, P99: p99}
		return seen{load.BystanderResult{Connects: l, Echoes: l, Machine: load.Latency{P99: machine}}, processors{Idle: idle}}
	}
	stolen := func(s seen) seen { s.Stolen = 0.4; return s }
	for _, c := range []struct {
		name          string
		calm, beside  seen
		ratio, median float64
		want          verdict
	}{
		{"as before", phase(2, 6, 1, 0.8), phase(3, 17, 2, 0.5), 3, 0, fair},
		{"below the floor", phase(0.1, 0.3, 1, 0.8), phase(3, 14, 2, 0.5), 3, 0, fair},
		{"slower on a quiet machine", phase(2, 6, 1, 0.8), phase(3, 19, 2, 0.5), 3, 0, unfair},
		{"a slower median on a quiet machine", phase(2, 6, 1, 0.8), phase(20, 17, 2, 0.5), 3, 3, unfair},
		{"slower while all is slow", phase(2, 6, 1, 0.8), phase(3, 60, 12, 0.5), 3, 0, unproven},
		{"slower than when all was slow", phase(2, 6, 12, 0.8), phase(3, 60, 2, 0.5), 3, 0, unproven},
		{"slower without a processor left", phase(2, 6, 1, 0.8), phase(3, 60, 2, 0.05), 3, 0, unproven},
		{"as before while all is slow", phase(2, 60, 12, 0), phase(3, 90, 12, 0), 3, 0, fair},
		{"beyond the ceiling while all is slow", phase(2, 2000, 50, 0), phase(3, 3100, 50, 0), 3, 0, shutOut},
		{"beyond the ceiling on a machine that stops as long", phase(2, 6, 1, 0.8), phase(3, 3100, 400, 0.5), 3, 0, unproven},
		{"slower while processors are stolen", phase(2, 6, 1, 0.8), stolen(phase(3, 60, 1, 0.5)), 3, 0, unproven},
		{"beyond the ceiling while processors are stolen", phase(2, 6, 1, 0.8), stolen(phase(3, 3100, 1, 0.5)), 3, 0,
			unproven},
	} {
		if got, why := judge(c.calm, c.beside, c.ratio, c.median); got != c.want {
			t.Errorf("%s: %v, not %v: %s", c.name, got, c.want, why)
		}
	}
	before, err := readTicks()
	must(t, err)
	time.Sleep(100 * time.Millisecond)
	after, err := readTicks()
	must(t, err)
	if p := after.since(before); after.all <= before.all || p.Idle < 0 || p.Stolen < 0 || p.Idle+p.Stolen > 1 {
		t.Errorf("%+v, then %+v: %+v", before, after, p)
	}
}
