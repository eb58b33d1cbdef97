package istio

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"istio.io/istio/pkg/config/protocol"
	"istio.io/istio/pkg/test/echo/common"
	"istio.io/istio/pkg/test/echo/proto"
	echoserver "istio.io/istio/pkg/test/echo/server"
	"istio.io/istio/pkg/test/echo/server/forwarder"

	"ztun/proxy/identity"
	"ztun/test/interop/rig"
)

// Istio's echo application, which its own ambient tests drive ztunnel with: the server as a pod's application, the
// client as a pod of its own.

// echoServer runs Istio's echo server at ip: TCP and HTTP/1.1 and, given a certificate, HBONE at its port. It returns
// the first two's addresses.
func echoServer(t *testing.T, ip netip.Addr, cert *identity.Certificate) (tcp, http netip.AddrPort) {
	t.Helper()
	t.Setenv("INSTANCE_IP", ip.String())
	ports := common.PortList{{Name: "tcp", Protocol: protocol.TCP}, {Name: "http", Protocol: protocol.HTTP}}
	cfg := echoserver.Config{Version: "v1", BindIPPortsMap: map[int]struct{}{0: {}, rig.Port: {}},
		ReportRequest: func() {}}
	if cert != nil {
		ports = append(ports, &common.Port{Name: "hbone", Protocol: protocol.HBONE, Port: rig.Port, TLS: true})
		files := rig.WritePEM(t, cert)
		cfg.TLSCert, cfg.TLSKey, cfg.TLSCACert = files.Cert, files.Key, files.Roots
	}
	cfg.Ports = ports
	s := echoserver.New(cfg)
	must(t, s.Start())
	t.Cleanup(func() { s.Close() }) // it answers with an error, always, and leaves the HBONE port open
	return netip.AddrPortFrom(ip, uint16(ports[0].Port)), netip.AddrPortFrom(ip, uint16(ports[1].Port))
}

// echoClient has Istio's echo client call url count times, with an HBONE proxy and, if there is one, a gateway before
// it.
func echoClient(t *testing.T, r *rig.Rig, url, message string, count int32, gateway string) []string {
	t.Helper()
	files := rig.WritePEM(t, r.Identity("client"))
	// What would be checked of the server is a host name, which certificates of a mesh have none of.
	hbone := func(addr string) *proto.HBONE {
		return &proto.HBONE{Address: addr, CertFile: files.Cert, KeyFile: files.Key, InsecureSkipVerify: true}
	}
	req := &proto.ForwardEchoRequest{Url: url, Message: message, Count: count,
		TimeoutMicros: common.DurationToMicros(rig.Wait), Hbone: hbone(r.Mesh())}
	if gateway != "" {
		req.DoubleHbone = hbone(gateway)
	}
	f := forwarder.New()
	defer f.Close()
	resp, err := f.ForwardEcho(t.Context(), &forwarder.Config{Request: req})
	must(t, err)
	if len(resp.Output) != int(count) {
		t.Fatalf("%d answers, want %d", len(resp.Output), count)
	}
	for _, a := range resp.Output {
		if !strings.Contains(a, "StatusCode=200\n") {
			t.Error("an answer without status 200")
		}
	}
	return resp.Output
}

// text is n characters that a line may hold.
func text(t *testing.T, n int64, seed uint64) string {
	t.Helper()
	raw, err := io.ReadAll(rig.Bulk(n/2, seed))
	must(t, err)
	return hex.EncodeToString(raw)
}

func TestEchoClient(t *testing.T) {
	r := rig.New(t)
	gateway(t, r)
	tcp, http := echoServer(t, r.Served, nil)
	for name, via := range map[string]string{"HBONE": "", "double HBONE": gatewayAddr(r)} {
		t.Run(name, func(t *testing.T) {
			for _, c := range []struct {
				size  int64 // characters
				count int32 // 20 at a time
			}{{3 * rig.MiB, 1}, {64 << 10, 60}} {
				message := text(t, c.size, 1)
				for _, a := range echoClient(t, r, "tcp://"+tcp.String(), message, c.count, via) {
					if !strings.Contains(a, " body] "+message+"\n") {
						t.Errorf("%d characters sent, among %d that came back they are not", len(message), len(a))
					}
				}
			}
			// One by one: the client's requests share what they write to.
			for range 5 {
				answer := echoClient(t, r, "http://"+http.String()+"/some/where", "", 1, via)[0]
				if !strings.Contains(answer, " body] URL=/some/where\n") ||
					!strings.Contains(answer, " body] Host="+http.String()+"\n") {
					t.Errorf("the server saw something else: %q", answer)
				}
			}
		})
	}
	if !strings.Contains(r.Log(), "src.identity=spiffe://cluster.local/ns/default/sa/client dst.addr="+r.Mesh()+
		" dst.hbone_addr="+tcp.String()) {
		t.Error("the log does not say who came")
	}
}

func TestEchoServer(t *testing.T) {
	r := rig.New(t)
	tcp, http := echoServer(t, r.Peer, r.Identity("peer"))
	t.Run("several MiB", func(t *testing.T) { must(t, echoExchange(r, tcp, 8*rig.MiB, 1)) })
	t.Run("in parallel", func(t *testing.T) {
		const streams = 60
		errs := make(chan error, streams)
		var all sync.WaitGroup
		for i := range streams {
			all.Go(func() { errs <- echoExchange(r, tcp, 256<<10, uint64(i)) })
		}
		all.Wait()
		for range streams {
			must(t, <-errs)
		}
	})
	t.Run("HTTP", func(t *testing.T) {
		c, err := r.Dial(http)
		must(t, err)
		defer c.Close()
		fmt.Fprintf(c, "GET /some/where HTTP/1.1\r\nHost: somebody\r\nConnection: close\r\n\r\n")
		answer, err := io.ReadAll(c)
		must(t, err)
		for _, want := range []string{"HTTP/1.1 200 OK\r\n", "\nURL=/some/where\n", "\nHost=somebody\n"} {
			if !strings.Contains(string(answer), want) {
				t.Errorf("no %q in %q", want, answer)
			}
		}
	})
	if n := r.Dialled(); n != 1 {
		t.Errorf("%d tunnels, want 1", n)
	}
}

// echoExchange sends n bytes to Istio's echo server, ends the direction, and checks that they come back, after what
// the server has to say, before the end.
func echoExchange(r *rig.Rig, dst netip.AddrPort, n int64, seed uint64) error {
	c, err := r.Dial(dst)
	if err != nil {
		return err
	}
	defer c.Close()
	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(c, rig.Bulk(n, seed))
		if err == nil {
			err = c.CloseWrite()
		}
		sent <- err
	}()
	got, err := io.ReadAll(c)
	if err != nil {
		return fmt.Errorf("after %d of %d bytes: %w", len(got), n, err)
	}
	if err := <-sent; err != nil {
		return err
	}
	head := len(got) - int(n)
	if head < 0 || !bytes.HasPrefix(got, []byte("StatusCode=200\n")) {
		return fmt.Errorf("%d bytes arrived, want more than %d", len(got), n)
	}
	return rig.Verify(bytes.NewReader(got[head:]), n, seed)
}
