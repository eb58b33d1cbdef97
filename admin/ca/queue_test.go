package ca

import (
	"testing"
	"time"

	"pgregory.net/rapid"
)

// TestQueueModel compares the two heaps with a list that is searched.
func TestQueueModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		q := newQueue()
		now := time.Unix(1000, 0)
		type item struct {
			e    *entry
			prio priority
			due  time.Time
			seq  int
		}
		var model []item
		seq := 0
		find := func(i int) *item { return &model[i] }
		for range rapid.IntRange(1, 80).Draw(t, "steps") {
			switch rapid.SampledFrom([]string{"push", "push", "pop", "bump", "remove", "sleep"}).Draw(t, "step") {
			case "push":
				seq++
				e := new(entry)
				prio := priority(rapid.IntRange(0, 2).Draw(t, "prio"))
				due := now.Add(time.Duration(rapid.IntRange(-2, 20).Draw(t, "due")) * time.Second)
				q.push(e, prio, due, now)
				model = append(model, item{e, prio, due, seq})
			case "pop":
				best := -1
				for i := range model {
					m := find(i)
					if m.due.After(now) {
						continue
					}
					if best < 0 {
						best = i
						continue
					}
					b := find(best)
					if m.prio < b.prio || m.prio == b.prio && (m.due.Before(b.due) || m.due.Equal(b.due) && m.seq < b.seq) {
						best = i
					}
				}
				got := q.pop(now)
				if best < 0 {
					if got != nil {
						t.Fatal("popped what is not due")
					}
					continue
				}
				if got != find(best).e || got.task != nil {
					t.Fatal("popped another one")
				}
				model = append(model[:best], model[best+1:]...)
			case "bump":
				if len(model) > 0 {
					m := find(rapid.IntRange(0, len(model)-1).Draw(t, "which"))
					prio := priority(rapid.IntRange(0, 2).Draw(t, "prio"))
					if m.e.task.heap == &q.ready {
						m.prio = min(m.prio, prio)
					}
					q.bump(m.e, prio)
				}
			case "remove":
				if len(model) > 0 {
					i := rapid.IntRange(0, len(model)-1).Draw(t, "which")
					q.remove(find(i).e)
					q.remove(find(i).e) // twice does nothing
					model = append(model[:i], model[i+1:]...)
				}
			case "sleep":
				now = now.Add(time.Duration(rapid.IntRange(0, 10).Draw(t, "seconds")) * time.Second)
			}
			if n := q.ready.Len() + q.later.Len(); n != len(model) {
				t.Fatalf("%d tasks, want %d", n, len(model))
			}
			if w := q.wait(now, time.Minute); w < 0 || w > time.Minute {
				t.Fatalf("wait %v", w)
			}
		}
	})
}
