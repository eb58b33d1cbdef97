package interop

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"ztun/test/interop/rig"
)

// Node's client against our server.

func TestNodeClientEcho(t *testing.T) {
	for _, c := range []struct {
		name    string
		streams int
		bytes   int
		opts    object
	}{
		{"bulk", 1, bulk, nil}, // its windows are of 64 KiB
		{"bulk with large windows", 1, bulk,
			object{"window": 16 << 20, "settings": object{"initialWindowSize": 4 << 20, "maxFrameSize": 1 << 20}}},
		{"bulk with padding", 1, 8 * rig.MiB, object{"padding": true}},
		{"small windows", 8, 256 << 10, object{"settings": object{"initialWindowSize": 1000}}},
		{"a hundred streams", 100, 256 << 10, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := rig.New(t)
			opts := object{"authority": r.App(r.Served, rig.Echo).String(), "streams": c.streams, "bytes": c.bytes}
			for k, v := range c.opts {
				opts[k] = v
			}
			var got struct{ Streams int }
			must(t, nodeClient(t, r, rig.WritePEM(t, r.Identity("client")), "echo", opts, &got))
			if got.Streams != c.streams || r.Accepted() != 1 {
				t.Errorf("%d streams, want %d; %d connections, want 1", got.Streams, c.streams, r.Accepted())
			}
		})
	}
}

func TestNodeClientHalfClose(t *testing.T) {
	r := rig.New(t)
	pem := rig.WritePEM(t, r.Identity("client"))
	t.Run("client ends first", func(t *testing.T) {
		var got struct{ Hash, Text string }
		app := r.App(r.Served, rig.Sink)
		must(t, nodeClient(t, r, pem, "clientFirst", object{"authority": app.String(), "bytes": large}, &got))
		if want := fmt.Sprintf("%d %s\n", large, got.Hash); got.Text != want {
			t.Errorf("application saw %q, want %q", got.Text, want)
		}
	})
	t.Run("server ends first", func(t *testing.T) {
		type seen struct {
			n    int64
			hash string
			err  error
		}
		end := make(chan seen, 1)
		app := r.App(r.Served, func(c *net.TCPConn) {
			io.WriteString(c, "bye")
			c.CloseWrite()
			h := sha256.New()
			n, err := io.Copy(h, c)
			end <- seen{n, hex.EncodeToString(h.Sum(nil)), err}
		})
		var got struct {
			Hash, Text string
			RST        int
		}
		must(t, nodeClient(t, r, pem, "serverFirst", object{"authority": app.String(), "bytes": large}, &got))
		if s := <-end; s.err != nil || s.n != large || s.hash != got.Hash {
			t.Errorf("application saw %+v, want %d bytes, %s", s, large, got.Hash)
		}
		if got.Text != "bye" || got.RST != 0 {
			t.Errorf("client read %q, stream ended with code %d", got.Text, got.RST)
		}
	})
	t.Run("server closes", func(t *testing.T) {
		var got struct {
			N    int64
			Hash string
		}
		app := r.App(r.Served, rig.Source(large, 1))
		must(t, nodeClient(t, r, pem, "read", object{"authority": app.String()}, &got))
		if got.N != large || got.Hash != rig.BulkHash(large, 1) {
			t.Errorf("%d bytes arrived, SHA-256 %s", got.N, got.Hash)
		}
	})
}

func TestNodeClientStatuses(t *testing.T) {
	r := rig.New(t)
	app := r.App(r.Served, rig.Echo)
	ln, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: r.Served.AsSlice()})
	must(t, err)
	closed := ln.Addr().String()
	ln.Close()
	var got struct {
		Statuses []int
		Headers  map[string]any
	}
	must(t, nodeClient(t, r, rig.WritePEM(t, r.Identity("client")), "status", object{
		"authorities": []string{at(r.Served, rig.DeniedPort).String(), closed, at(r.Client, 80).String(), "nonsense",
			"nobody.default.svc.cluster.local:80"},
		"authority": app.String(),
		"headers": object{"baggage": "k8s.cluster.name=elsewhere", "forwarded": "for=192.0.2.1;proto=http",
			"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
			"x-unknown":   strings.Repeat("x", 10000), "cookie": []string{"a=1", "b=2"}},
	}, &got))
	if s := fmt.Sprint(got.Statuses); s != "[401 503 400 400 503]" {
		t.Errorf("statuses %s", s)
	}
	if got.Headers[":status"] != 200.0 ||
		!strings.Contains(fmt.Sprint(got.Headers["baggage"]), "k8s.deployment.name=served") {
		t.Errorf("answered with %v", got.Headers)
	}
	if r.Accepted() != 1 {
		t.Errorf("refusals cost the tunnel: %d connections, want 1", r.Accepted())
	}
}

func TestNodeClientCancels(t *testing.T) {
	r := rig.New(t)
	end := make(chan error, 1)
	app := r.App(r.Served, func(c *net.TCPConn) {
		_, err := io.Copy(c, rig.Bulk(1<<40, 1))
		end <- err
	})
	opts := object{"authority": app.String(), "echo": r.App(r.Served, rig.Echo).String()}
	var got struct{ N int64 }
	must(t, nodeClient(t, r, rig.WritePEM(t, r.Identity("client")), "cancel", opts, &got))
	if got.N < rig.MiB || <-end == nil || r.Accepted() != 1 {
		t.Errorf("client read %d bytes, %d connections", got.N, r.Accepted())
	}
}

func TestNodeClientVanishes(t *testing.T) {
	r := rig.New(t)
	end := make(chan error, 1)
	app := r.App(r.Served, func(c *net.TCPConn) {
		_, err := io.Copy(c, rig.Bulk(1<<40, 1))
		end <- err
	})
	var got struct{ N int64 }
	must(t, nodeClient(t, r, rig.WritePEM(t, r.Identity("client")), "vanish", object{"authority": app.String()}, &got))
	select {
	case err := <-end:
		if err == nil {
			t.Error("application finished what never ends")
		}
	case <-time.After(rig.Wait):
		t.Error("application was not told")
	}
}

func TestNodeClientPings(t *testing.T) {
	r := rig.New(t)
	opts := object{"authority": r.App(r.Served, rig.Echo).String(), "pings": 20, "idle": 500}
	must(t, nodeClient(t, r, rig.WritePEM(t, r.Identity("client")), "pings", opts, new(struct{})))
}

func TestNodeClientCertificates(t *testing.T) {
	r := rig.New(t)
	app := r.App(r.Served, rig.Echo)
	good := rig.WritePEM(t, r.Identity("client"))
	stranger := rig.WritePEM(t, rig.Issue(t, rig.NewCA(t, "cluster.local"), rig.ID("client")))
	stranger.Roots = good.Roots
	for name, pem := range map[string]rig.PEM{"none": {Roots: good.Roots}, "of another CA": stranger} {
		t.Run(name, func(t *testing.T) {
			var got struct{ Streams int }
			err := nodeClient(t, r, pem, "echo", object{"authority": app.String(), "streams": 1, "bytes": 1000}, &got)
			if err == nil {
				t.Fatal("served")
			}
			t.Log(err)
		})
	}
	if strings.Contains(r.Log(), "connection complete") {
		t.Error("a connection reached the application")
	}
}
