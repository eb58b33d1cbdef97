package control

import (
	_ "embed"
	"net/http"
	"slices"
	"strings"

	"ztun/admin/page"
)

// What the page shows of each list; the rest is counted, and in /status.
const (
	pageNodes = 500
	pagePods  = 30 // of a node
)

//go:embed page.html
var pageText string

// controlPage is what the template sees.
type controlPage struct {
	Status
	Shown     []pageNode // nodes in trouble first
	Hidden    int
	Joined    int
	Connected int
	Behind    int
}

// pageNode is a node with a word on how it is.
type pageNode struct {
	NodeStatus
	State, Class string
}

func (s *Server) page() (http.Handler, error) {
	return page.New(pageText, func() any { return pageOf(s.Status()) })
}

func pageOf(st Status) controlPage {
	p := controlPage{Status: st}
	for _, n := range byNode(st.Nodes) {
		x := pageNode{NodeStatus: n}
		x.State, x.Class = n.summary()
		p.Joined++
		if n.Connected {
			p.Connected++
		}
		if n.Connected && x.Class != "good" {
			p.Behind++
		}
		p.Shown = append(p.Shown, x)
	}
	rank := func(class string) int { return strings.Index("bad warn good", class) }
	slices.SortStableFunc(p.Shown, func(a, b pageNode) int { return rank(a.Class) - rank(b.Class) })
	p.Hidden = max(0, len(p.Shown)-pageNodes)
	p.Shown = p.Shown[:len(p.Shown)-p.Hidden]
	return p
}

// summary is how a node is, in a word, and how bad that is.
func (n *NodeStatus) summary() (state, class string) {
	if !n.Connected {
		return "not connected", "bad"
	}
	if len(n.Types) == 0 {
		return "no request yet", "warn"
	}
	state, class = "in sync", "good"
	for i := range n.Types {
		switch s := n.Types[i].state(); s {
		case "in sync":
		case "rejects":
			return s, "bad"
		default:
			state, class = s, "warn"
		}
	}
	return state, class
}

// StateText and LagText are what the template asks of a type.
func (y TypeStatus) StateText() string { return y.state() }
func (y TypeStatus) LagText() string   { return y.lagText() }
