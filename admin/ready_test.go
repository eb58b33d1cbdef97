package admin

import (
	"errors"
	"testing"
	"time"
)

func TestReady(t *testing.T) {
	now := time.Unix(1000, 0)
	r := NewReady(func() time.Time { return now })
	if p, _ := r.State(); len(p) != 0 {
		t.Errorf("an empty set is not ready: %v", p)
	}
	proxy := r.Register("proxy")
	dns := r.Register("dns proxy")
	p, changed := r.State()
	if len(p) != 2 || p[0].Name != "dns proxy" || p[1].Name != "proxy" || !p[0].Since.Equal(now) {
		t.Errorf("pending: %v", p)
	}
	now = now.Add(time.Second)
	proxy.Fail(errors.New("one"))
	proxy.Fail(errors.New("two"))
	if p := r.Pending()[1]; p.LastError == nil || p.LastError.Error() != "two" || p.Failures != 2 ||
		now.Sub(p.Since) != time.Second {
		t.Errorf("%+v", p)
	}
	proxy.Done()
	proxy.Done()
	select {
	case <-changed:
	default:
		t.Error("a change was not signalled")
	}
	dns.Done()
	dns.Fail(errors.New("late"))
	if p := r.Pending(); len(p) != 0 {
		t.Errorf("pending: %v", p)
	}
	dns.Again()
	if p := r.Pending(); len(p) != 1 || p[0].LastError != nil || p[0].Failures != 0 || !p[0].Since.Equal(now) {
		t.Errorf("pending again: %+v", p)
	}
	if r.Register("dns proxy") != dns || len(r.Pending()) != 1 {
		t.Error("registering a name again made another task")
	}
}
