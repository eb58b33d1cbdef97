package fair

import (
	"math/rand/v2"
	"sync"
	"testing"
)

func TestBudget(t *testing.T) {
	daemon := NewBudget(nil, 800)
	a, b := NewBudget(daemon, 400), NewBudget(daemon, 0)
	a.Add(299)
	if a.Tight() || b.Tight() {
		t.Error("tight too early")
	}
	a.Add(1)
	if !a.Tight() || b.Tight() || daemon.Tight() {
		t.Error("a pod that has used its share is tight, and no other")
	}
	b.Add(300)
	if !b.Tight() || daemon.Used() != 600 {
		t.Error("a daemon that is tight makes all its pods tight")
	}
	a.Add(-300)
	if a.Tight() || b.Tight() || a.Used() != 0 || daemon.Used() != 300 || a.Limit() != 400 {
		t.Error("what was given back still counts")
	}
	var none *Budget
	none.Add(1)
	if none.Tight() || none.Used() != 0 || none.Limit() != 0 || NewBudget(nil, 0).Tight() {
		t.Error("no budget is never tight")
	}
}

// TestAccount: an account is never off by more than a step, and by nothing when nothing is held, also when many count.
func TestAccount(t *testing.T) {
	b := NewBudget(nil, 1<<30)
	var a Account
	a.Open(b)
	for range 1000 {
		a.Add(rand.Int64N(2*accountStep) - a.Load()/2)
		if off := a.Load() - b.Used(); off >= accountStep || off <= -accountStep {
			t.Fatalf("off by %d", off)
		}
	}
	a.Add(-a.Load())
	if b.Used() != 0 {
		t.Errorf("%d bytes are left in the budget of an account that holds none", b.Used())
	}
	for range 50 {
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for range 100 {
					n := rand.Int64N(2 * accountStep)
					a.Add(n)
					a.Add(-n)
				}
			})
		}
		wg.Wait()
		if a.Load() != 0 || b.Used() != 0 {
			t.Fatalf("%d held, %d in the budget", a.Load(), b.Used())
		}
	}
}
