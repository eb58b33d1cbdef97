package interop

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"ztun/proxy/hbone"
	"ztun/proxy/refusal"
	"ztun/test/interop/rig"
)

// Our client, with its pool, against Node's server.

// served runs f against a server with options and checks that Node had nothing to complain about.
func served(t *testing.T, opts object, f func(r *rig.Rig, s *nodeServer)) {
	t.Helper()
	r := rig.New(t)
	s := serveNode(t, r, "peer", opts)
	f(r, s)
	if c := s.complaints(); len(c) > 0 {
		t.Errorf("node complains: %q", c)
	}
}

func TestNodeServerEcho(t *testing.T) {
	for _, c := range []struct {
		name    string
		streams int
		bytes   int64
		opts    object
	}{
		{"bulk", 1, bulk, nil}, // its windows are of 64 KiB
		{"bulk with large windows", 1, bulk,
			object{"window": 16 << 20, "settings": object{"initialWindowSize": 4 << 20, "maxFrameSize": 1 << 20}}},
		{"bulk with padding and frames of extensions", 1, 8 * rig.MiB, object{"padding": true, "chatter": true}},
		{"small windows, no header table", 8, 256 << 10,
			object{"settings": object{"initialWindowSize": 1000, "headerTableSize": 0}}},
		{"a hundred streams", 100, 256 << 10, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			served(t, c.opts, func(r *rig.Rig, s *nodeServer) {
				app := r.App(r.Peer, rig.Echo)
				var all, open sync.WaitGroup
				errs := make(chan error, c.streams)
				open.Add(c.streams)
				for i := range c.streams {
					all.Go(func() {
						errs <- func() error {
							conn, err := r.Dial(app)
							open.Done()
							if err != nil {
								return err
							}
							defer conn.Close()
							open.Wait() // all are open at the same time
							return rig.Exchange(conn, c.bytes, uint64(i))
						}()
					})
				}
				all.Wait()
				for range c.streams {
					must(t, <-errs)
				}
				if n := r.Dialled(); n != 1 {
					t.Errorf("%d tunnels for %d streams, want 1", n, c.streams)
				}
			})
		})
	}
}

// A server that allows few streams: the pool has to respect that, and to open more tunnels.
func TestNodeServerAllowsFewStreams(t *testing.T) {
	served(t, object{"settings": object{"maxConcurrentStreams": 10}}, func(r *rig.Rig, s *nodeServer) {
		app := r.App(r.Peer, rig.Echo)
		for i := range 25 {
			c, err := r.Dial(app)
			if err != nil {
				t.Fatalf("stream %d: %v", i, err)
			}
			defer c.Close()
			_, err = c.Write([]byte{1})
			must(t, err)
			_, err = io.ReadFull(c, make([]byte, 1))
			must(t, err)
		}
		if n := r.Dialled(); n != 3 {
			t.Errorf("%d tunnels for 25 streams of 10 at most, want 3", n)
		}
	})
}

func TestNodeServerHalfClose(t *testing.T) {
	served(t, nil, func(r *rig.Rig, s *nodeServer) {
		t.Run("client ends first", func(t *testing.T) {
			c, err := r.Dial(r.App(r.Peer, rig.Sink))
			must(t, err)
			defer c.Close()
			_, err = io.Copy(c, rig.Bulk(large, 2))
			must(t, err)
			must(t, c.CloseWrite())
			answer, err := io.ReadAll(c)
			must(t, err)
			if want := fmt.Sprintf("%d %s\n", large, rig.BulkHash(large, 2)); string(answer) != want {
				t.Errorf("application saw %q, want %q", answer, want)
			}
		})
		t.Run("server ends first", func(t *testing.T) {
			got := make(chan error, 1)
			c, err := r.Dial(r.App(r.Peer, func(c *net.TCPConn) {
				io.Copy(c, rig.Bulk(large, 3))
				c.CloseWrite()
				got <- rig.Verify(c, large, 4)
			}))
			must(t, err)
			defer c.Close()
			must(t, rig.Verify(c, large, 3))
			_, err = io.Copy(c, rig.Bulk(large, 4))
			must(t, err)
			must(t, c.CloseWrite())
			must(t, <-got)
		})
		if n := r.Dialled(); n != 1 {
			t.Errorf("%d tunnels, want 1", n)
		}
	})
}

func TestNodeServerRefuses(t *testing.T) {
	served(t, nil, func(r *rig.Rig, s *nodeServer) {
		ln, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: r.Peer.AsSlice()})
		must(t, err)
		dst := ln.Addr().(*net.TCPAddr).AddrPort()
		ln.Close()
		_, err = r.Dial(dst)
		var refused *rig.RefusedError
		if !errors.As(err, &refused) || refused.Refusal != refusal.Reset {
			t.Errorf("got %v, want a refusal with RST", err)
		}
		want := "http status: 503 Service Unavailable"
		if !rig.Eventually(func() bool { return strings.Contains(r.Log(), want) }) { // the SYN is answered first
			t.Errorf("log lacks %q", want)
		}
		cc, err := r.Tunnel(at(r.Peer, rig.Port).String(), "peer", hbone.Config{})
		must(t, err)
		for _, code := range []int{204, 302, 400, 401, 403, 502, 599} {
			_, resp, err := cc.Open(t.Context(), &hbone.Request{Authority: fmt.Sprintf("refuse-with-%d:1", code)})
			var status *hbone.StatusError
			if !errors.As(err, &status) || status.Status != code || resp == nil || resp.Status != code {
				t.Errorf("answered with %d: got %v, %v", code, resp, err)
			}
		}
		if err := cc.Err(); err != nil {
			t.Errorf("refusals cost the tunnel: %v", err)
		}
	})
}

func TestNodeServerSeesCancel(t *testing.T) {
	served(t, nil, func(r *rig.Rig, s *nodeServer) {
		cc, err := r.Tunnel(at(r.Peer, rig.Port).String(), "peer", hbone.Config{})
		must(t, err)
		// Given up before there was an answer.
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			s.await(func(l nodeLine) bool { return l.Headers[":authority"] == "silent:1" })
			cancel()
		}()
		if _, _, err := cc.Open(ctx, &hbone.Request{Authority: "silent:1"}); !errors.Is(err, context.Canceled) {
			t.Errorf("Open: %v", err)
		}
		l := s.await(func(l nodeLine) bool { return l.Closed == "silent:1" })
		if l.Code != int(http2.ErrCodeCancel) {
			t.Errorf("node saw the stream closed with code %d, want CANCEL", l.Code)
		}
		// And in the middle: the application behind Node is let go.
		end := make(chan error, 1)
		app := r.App(r.Peer, func(c *net.TCPConn) {
			_, err := io.Copy(c, rig.Bulk(1<<40, 1))
			end <- err
		})
		c, _, err := cc.Open(t.Context(), &hbone.Request{Authority: app.String()})
		must(t, err)
		_, err = io.CopyN(io.Discard, c, rig.MiB)
		must(t, err)
		c.Close()
		select {
		case <-end:
		case <-time.After(rig.Wait):
			t.Error("application was not told")
		}
		if err := cc.Err(); err != nil {
			t.Errorf("the tunnel did not survive: %v", err)
		}
	})
}

func TestNodeServerVanishes(t *testing.T) {
	r := rig.New(t)
	s := serveNode(t, r, "peer", nil)
	app := r.App(r.Peer, func(c *net.TCPConn) { io.Copy(c, rig.Bulk(1<<40, 5)) })
	c, err := r.Dial(app)
	must(t, err)
	defer c.Close()
	_, err = io.CopyN(io.Discard, c, rig.MiB)
	must(t, err)
	s.kill()
	c.SetReadDeadline(time.Now().Add(rig.Wait))
	if _, err := io.Copy(io.Discard, c); err == nil {
		t.Error("a lost tunnel looks like an orderly end")
	}
	// It comes back: the pool must not stick to the tunnel that it lost.
	serveNode(t, r, "peer", nil)
	c, err = r.Dial(r.App(r.Peer, rig.Echo))
	must(t, err)
	defer c.Close()
	must(t, rig.Exchange(c, rig.MiB, 6))
}

// GOAWAY: streams that are open go on, new ones use another tunnel.
func TestNodeServerSaysGoAway(t *testing.T) {
	served(t, nil, func(r *rig.Rig, s *nodeServer) {
		app := r.App(r.Peer, rig.Echo)
		c, err := r.Dial(app)
		must(t, err)
		defer c.Close()
		_, err = c.Write([]byte{1})
		must(t, err)
		_, err = io.ReadFull(c, make([]byte, 1))
		must(t, err)
		s.tell("drain")
		if !rig.Eventually(func() bool {
			c, err := r.Dial(app)
			if err != nil {
				t.Errorf("while the server drains: %v", err)
				return true
			}
			defer c.Close()
			if err := rig.Exchange(c, 1000, 7); err != nil {
				t.Errorf("while the server drains: %v", err)
				return true
			}
			return r.Dialled() > 1
		}) {
			t.Error("the pool stays with a session that said GOAWAY")
		}
		must(t, rig.Exchange(c, large, 8))
		// The drained session ends with its last stream.
		if !rig.Eventually(func() bool {
			s.tell("sessions")
			time.Sleep(50 * time.Millisecond)
			l := s.await(func(l nodeLine) bool { return l.Sessions != nil && *l.Sessions == 1 })
			return l.Sessions != nil
		}) {
			t.Error("the drained session stays")
		}
	})
}

// What our client sends, seen with others' eyes.
func TestNodeServerSeesRequest(t *testing.T) {
	served(t, nil, func(r *rig.Rig, s *nodeServer) {
		app := r.App(r.Peer, rig.Echo)
		c, err := r.Dial(app)
		must(t, err)
		defer c.Close()
		l := s.await(func(l nodeLine) bool { return l.Headers != nil })
		var names []string
		for name := range l.Headers {
			names = append(names, name)
		}
		slices.Sort(names)
		if want := []string{":authority", ":method", "baggage", "forwarded", "traceparent"}; !slices.Equal(names, want) {
			t.Errorf("header fields %q, want %q", names, want)
		}
		if l.Headers[":method"] != "CONNECT" || l.Headers[":authority"] != app.String() {
			t.Errorf("%v %v", l.Headers[":method"], l.Headers[":authority"])
		}
		if want := "URI:spiffe://cluster.local/ns/default/sa/client"; l.SAN != want {
			t.Errorf("client certificate for %q, want %q", l.SAN, want)
		}
	})
}
