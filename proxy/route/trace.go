package route

import (
	"net/netip"

	"ztun/proxy/state"
)

// Trace is what a decision went by, in order. Decide fills in the one of its Question, from the very look-ups and
// choices that it makes; without one it costs nothing.
type Trace struct{ Steps []Step }

// StepKind says what a Step looked for.
type StepKind uint8

// The kinds.
const (
	// StepCalled: what the destination is: Workload, Service, or neither.
	StepCalled StepKind = iota
	// StepServiceWaypoint: Service is reached through Gateway.
	StepServiceWaypoint
	// StepWorkloadWaypoint: Workload is reached through Gateway, as it was called by itself.
	StepWorkloadWaypoint
	// StepFromWaypoint: Workload has the waypoint Gateway, which is the caller itself.
	StepFromWaypoint
	// StepNetworkGateway: Workload is in another network, which is reached through Gateway.
	StepNetworkGateway
	// StepBalance: an endpoint of Service for Target; Workload is the one that was chosen, nil if there is none.
	StepBalance
	// StepNoPort: Service has no port Target.
	StepNoPort
	// StepPassthrough: Service is to be reached at whatever address was called.
	StepPassthrough
	// StepUnknown: nothing is known at Target, in the network in question.
	StepUnknown
)

// Step is one look-up or choice.
type Step struct {
	Kind     StepKind
	Target   netip.AddrPort // what was looked for
	Service  *state.Service
	Workload *state.Workload
	Gateway  *state.GatewayAddress
	// Candidates are the endpoints of a StepBalance, the first MaxCandidates of them.
	Candidates []Candidate
}

// MaxCandidates bounds the endpoints that a Step lists.
const MaxCandidates = 100

// Candidate is an endpoint as it was judged.
type Candidate struct {
	UID      string
	Workload *state.Workload // nil: the record is not there
	Rank     int             // those of the highest rank are drawn from, by Weight
	Weight   uint32
	Excluded Exclusion
	Chosen   bool
}

// Exclusion is why an endpoint may not be chosen.
type Exclusion uint8

// The exclusions.
const (
	NotExcluded  Exclusion = iota
	NoRecord               // its workload is not known
	Avoided                // it could not be reached lately (Question.Avoid)
	NoAddress              // it has neither an address nor a hostname nor a gateway
	PortUnmapped           // it does not map the service's port, nor does the service
	NoTunnel               // a waypoint by a port that its service does not list needs an application tunnel
	WrongPlace             // it is not where a strict preference wants it
)

// String says it in words.
func (x Exclusion) String() string {
	return [...]string{
		NotExcluded:  "",
		NoRecord:     "its workload is not known",
		Avoided:      "it could not be reached lately",
		NoAddress:    "it has no address to send to",
		PortUnmapped: "it does not map the port",
		NoTunnel:     "it has no application tunnel",
		WrongPlace:   "it is not in the place that the service insists on",
	}[x]
}

// Reset forgets what was traced. Safe on nil.
func (t *Trace) Reset() {
	if t != nil {
		t.Steps = nil
	}
}

func (t *Trace) add(s Step) { t.Steps = append(t.Steps, s) }

// note writes down a choice among the endpoints of b.s, judged once more as pick judged them. (The service is given
// apart, since escape analysis knows no fields: what is taken from b would take the resolver to the heap, for every
// decision.)
func (b *balancer) note(service *state.Service, target netip.AddrPort, chosen *state.Endpoint) {
	s := Step{Kind: StepBalance, Target: target, Service: service}
	for i := range service.Endpoints {
		e := &service.Endpoints[i]
		w, rank, why := b.candidate(e)
		c := Candidate{UID: e.UID, Workload: w, Rank: rank, Excluded: why, Chosen: e == chosen}
		if w == nil {
			c.Workload = b.r.v.EndpointWorkload(e)
		}
		if c.Workload != nil {
			c.Weight = c.Workload.Capacity
		}
		if c.Chosen {
			s.Workload = w
		}
		if len(s.Candidates) < MaxCandidates {
			s.Candidates = append(s.Candidates, c)
		} else if c.Chosen {
			s.Candidates[MaxCandidates-1] = c
		}
	}
	b.r.q.Trace.add(s)
}
