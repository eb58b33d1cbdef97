package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"
)

// Event is what the agent is asked, as istio-cni's plugin asks it: POST AddPath. UID is ours; others leave it out.
type Event struct {
	Netns        string // path of the pod's network namespace, as the node sees it
	PodName      string
	PodNamespace string
	PodUID       string `json:",omitempty"`
	IPs          []IP
}

// IP is an address that the plugins before have given the pod.
type IP struct {
	Interface *int // index in the result's interfaces
	Address   net.IPNet
	Gateway   net.IP
}

// AddPath is where the agent is asked, under its socket.
const AddPath = "/cmdadd"

// away says that no agent decides: none listens, it does not answer in time, or it answers 504.
type away struct{ error }

func (a away) Unwrap() error { return a.error }

// refusal is the agent's answer that the pod must not start.
type refusal struct {
	status int
	reason string
}

func (r *refusal) Error() string { return r.reason }

// ask asks the agent once and returns nil where the pod may start, an away, a *refusal, or ctx's error.
func ask(ctx context.Context, socket string, e Event) error {
	body, err := json.Marshal(e)
	if err != nil {
		return err
	}
	t := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://ztun"+AddPath, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	// A redirect would lead anywhere; the agent has no reason for one.
	resp, err := t.RoundTrip(req)
	if err != nil {
		return away{err}
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusOK {
		return nil
	}
	text, _ := io.ReadAll(io.LimitReader(resp.Body, maxReason)) // as much of the reason as there is
	reason := strings.TrimSpace(strings.ToValidUTF8(string(text), "\uFFFD"))
	if reason == "" {
		reason = resp.Status
	}
	if resp.StatusCode == http.StatusGatewayTimeout {
		return away{errors.New(reason)}
	}
	return &refusal{resp.StatusCode, reason}
}

// maxReason bounds what of an answer goes into a pod's event, in bytes.
const maxReason = 1024

// patience is how long the plugin waits.
type patience struct {
	answer time.Duration // for one answer
	enrol  time.Duration // for an agent to be there, where the pod is the mesh's: a restart of it
	again  time.Duration // between two tries
}

// usual: kubelet waits for four minutes, and tries again by itself.
var usual = patience{answer: 10 * time.Second, enrol: 5 * time.Second, again: 200 * time.Millisecond}

// own reports whether a pod is one of ztun's, which must start for the others to.
func (e Entry) own(ev Event) bool {
	return slices.ContainsFunc(e.Own, func(prefix string) bool {
		return strings.HasPrefix(ev.PodNamespace+"/"+ev.PodName, prefix)
	})
}

// admit asks the agent whether a pod may start. While there is none it goes by what that has left on the disk: pods of
// the mesh wait for it, for a while, the others start.
func admit(ctx context.Context, e Entry, ev Event, p patience) error {
	deadline := time.Now().Add(p.enrol)
	for {
		one, cancel := context.WithTimeout(ctx, p.answer)
		err := ask(one, e.Socket, ev)
		cancel()
		var gone away
		if !errors.As(err, &gone) {
			return err
		}
		if e.own(ev) {
			return nil
		}
		known, kerr := readEnrolled(e.Enrolled)
		if kerr == nil && !known.Waits(ev.PodNamespace, ev.PodName) {
			return nil
		}
		if time.Now().After(deadline) {
			if kerr != nil {
				return away{fmt.Errorf("the node agent does not answer (%w), and what it knew cannot be read: %w", gone, kerr)}
			}
			return away{fmt.Errorf("the node agent does not answer (%w), and pods of namespace %s are the mesh's",
				gone, ev.PodNamespace)}
		}
		select {
		case <-time.After(p.again):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
