package route_test

import (
	"errors"
	"reflect"

	"ztun/proxy/route"
	"ztun/proxy/state"
)

// decide decides twice, with a trace and without, by the same draws, and holds the two and the trace against each
// other: what `ztun explain` tells cannot differ from what is done. Every row of the tables and every random question
// goes through it.
func decide(t interface {
	Helper()
	Errorf(string, ...any)
}, v *state.View, q route.Question) (route.Decision, error) {
	t.Helper()
	var draws []uint64
	rand := q.Rand
	q.Rand = func(n uint64) uint64 {
		x := rand(n)
		draws = append(draws, x)
		return x
	}
	d, err := route.Decide(v, q)
	var trace route.Trace
	var missed string
	q.Trace = &trace
	if q.Missed != nil {
		q.Missed = &missed
	}
	q.Rand = func(uint64) uint64 {
		if len(draws) == 0 {
			t.Errorf("a trace draws more often")
			return 0
		}
		x := draws[0]
		draws = draws[1:]
		return x
	}
	traced, terr := route.Decide(v, q)
	if !reflect.DeepEqual(d, traced) || (err == nil) != (terr == nil) || err != nil && err.Error() != terr.Error() ||
		len(draws) > 0 {
		t.Errorf("without a trace %+v, %v, with one %+v, %v", d, err, traced, terr)
	}
	if len(trace.Steps) == 0 || trace.Steps[0].Kind != route.StepCalled || trace.Steps[0].Target.Port() != q.Dst.Port() {
		t.Errorf("the trace does not begin with what was called: %+v", trace.Steps)
		return d, err
	}
	var last *route.Step // the last that chose or did not
	kinds := map[route.StepKind]bool{}
	for i := range trace.Steps {
		s := &trace.Steps[i]
		kinds[s.Kind] = true
		if s.Kind != route.StepBalance {
			continue
		}
		last = s
		best, chosen := -1, 0
		for _, c := range s.Candidates {
			if c.Excluded == route.NotExcluded && c.Weight > 0 { // those of no weight decide the rank, too, but are never drawn
				best = max(best, c.Rank)
			}
		}
		for _, c := range s.Candidates {
			if !c.Chosen {
				continue
			}
			chosen++
			if c.Excluded != route.NotExcluded || c.Rank != best || c.Workload != s.Workload || c.Weight == 0 {
				t.Errorf("chosen is %+v, of rank %d the best", c, best)
			}
		}
		if want := map[bool]int{true: 1}[s.Workload != nil]; chosen != want {
			t.Errorf("%d are chosen of %+v, want %d", chosen, s.Candidates, want)
		}
	}
	is := func(code route.Code) bool { return errors.Is(err, &route.Error{Code: code}) }
	switch {
	case err == nil && d.Waypoint && !kinds[route.StepServiceWaypoint] && !kinds[route.StepWorkloadWaypoint],
		err == nil && d.Protocol == route.DoubleHBONE && !kinds[route.StepNetworkGateway],
		is(route.UnknownWaypoint) && !kinds[route.StepServiceWaypoint] && !kinds[route.StepWorkloadWaypoint],
		is(route.UnknownNetworkGateway) && !kinds[route.StepNetworkGateway]:
		t.Errorf("%+v, %v is not told by %+v", d, err, trace.Steps)
	case is(route.NoHealthyUpstream) && !kinds[route.StepNoPort] && !kinds[route.StepUnknown] &&
		!kinds[route.StepPassthrough] && (last == nil || last.Workload != nil && d.Workload != nil):
		t.Errorf("no upstream, though the trace has %+v", trace.Steps)
	case err == nil && d.Alternatives() && (last == nil || last.Workload != d.Workload && last.Workload != d.Upstream):
		t.Errorf("%v was chosen, the trace has %+v", d.Workload, last)
	}
	return d, err
}
