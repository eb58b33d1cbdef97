package browser

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"

	"ztun/admin"
	"ztun/admin/zlog"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// tab is a page of the browser and what it complained of.
type tab struct {
	t   testing.TB
	ctx context.Context

	mu     sync.Mutex
	faults []string
}

// open starts a browser with one empty page.
func open(t testing.TB) *tab {
	t.Helper()
	bin, err := exec.LookPath("chromium")
	if err != nil {
		t.Fatalf("%v (Debian: apt-get install chromium; .ci/run installs it)", err)
	}
	alloc, stop := chromedp.NewExecAllocator(context.Background(), append(chromedp.DefaultExecAllocatorOptions[:],
		chromedp.ExecPath(bin), chromedp.NoSandbox, chromedp.DisableGPU, chromedp.Flag("disable-dev-shm-usage", true),
		chromedp.WSURLReadTimeout(time.Minute), chromedp.UserDataDir(t.TempDir()))...)
	t.Cleanup(stop)
	ctx, cancel := chromedp.NewContext(alloc)
	t.Cleanup(cancel)
	ctx, late := context.WithTimeout(ctx, 3*time.Minute)
	t.Cleanup(late)
	b := &tab{t: t, ctx: ctx}
	fault := func(format string, args ...any) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.faults = append(b.faults, fmt.Sprintf(format, args...))
	}
	must(t, chromedp.Listen(ctx, func(e any) {
		switch e := e.(type) {
		case *runtime.EventExceptionThrown:
			fault("exception: %v", &chromedp.ExceptionError{ExceptionDetails: e.ExceptionDetails})
		case *runtime.EventConsoleAPICalled:
			fault("console.%s: %v", e.Type, e.Args)
		case *log.EventEntryAdded:
			fault("%s: %s %s", e.Entry.Source, e.Entry.Text, e.Entry.URL)
		case *page.EventJavascriptDialogOpening:
			fault("dialog: %s", e.Message)
			go chromedp.Call(ctx, page.HandleJavaScriptDialog, page.HandleJavaScriptDialogParams{Accept: false})
		}
	}))
	tell(b, log.Enable, cdp.Empty{})
	return b
}

type step = chromedp.Action[chromedp.Void]

func (b *tab) do(steps ...step) {
	b.t.Helper()
	must(b.t, chromedp.Do(b.ctx, steps...))
}

// get is what an action yields.
func get[T any](b *tab, a chromedp.Action[T]) T {
	b.t.Helper()
	v, err := chromedp.Run(b.ctx, a)
	must(b.t, err)
	return v
}

// tell sends a command of the protocol.
func tell[P, R any](b *tab, c cdp.Command[P, R], p P) {
	b.t.Helper()
	_, err := chromedp.Call(b.ctx, c, p)
	must(b.t, err)
}

func click(css string) step { return chromedp.Click(chromedp.CSS(css)) }

// eval is what an expression yields in the page.
func eval[T any](b *tab, expr string) T {
	b.t.Helper()
	return get(b, chromedp.Evaluate[T](expr))
}

// complaints are those since the last call.
func (b *tab) complaints() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	f := b.faults
	b.faults = nil
	return f
}

// quiet fails the test for whatever the browser complained of.
func (b *tab) quiet(what string) {
	b.t.Helper()
	for _, f := range b.complaints() {
		b.t.Errorf("%s: %s", what, f)
	}
}

// eventually waits until an expression is true.
func (b *tab) eventually(what, expr string) {
	b.t.Helper()
	for range 300 {
		if eval[bool](b, expr) {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	b.t.Fatalf("%s: never (%s)", what, expr)
}

// looks looks at the page in some lights and each width: nothing sticks out to the side, text stands out from its
// ground.
func (b *tab) looks(url, name string, schemes ...string) {
	b.t.Helper()
	for _, scheme := range schemes {
		for _, width := range []int64{1280, 400} {
			what := fmt.Sprintf("%s, %s, %d", name, scheme, width)
			tell(b, emulation.SetEmulatedMedia,
				emulation.SetEmulatedMediaParams{
					Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}}})
			b.do(chromedp.EmulateViewport(width, 900), chromedp.Navigate(url), chromedp.WaitVisible(chromedp.CSS("main")))
			if over := eval[int](b, `document.documentElement.scrollWidth - innerWidth`); over > 0 {
				b.t.Errorf("%s: %d pixels too wide: %s", what, over, eval[string](b, widest))
			}
			if low := eval[[]string](b, faint); len(low) > 0 {
				b.t.Errorf("%s: hardly legible: %q", what, low)
			}
			if dark := eval[bool](b, `lightness(getComputedStyle(document.body).backgroundColor) < .2`); dark !=
				(scheme == "dark") {
				b.t.Errorf("%s: the ground is dark: %v", what, dark)
			}
			b.quiet(what)
			if dir := os.Getenv("ZTUN_SHOTS"); dir != "" {
				for part, shot := range map[string]chromedp.Action[[]byte]{"": chromedp.FullScreenshot(100),
					"-top": chromedp.CaptureScreenshot()} {
					if part == "" && name == "hostile" {
						continue // some are too long for a picture
					}
					must(b.t, os.WriteFile(filepath.Join(dir, fmt.Sprintf("%s-%s-%d%s.png", name, scheme, width, part)),
						get(b, shot), 0o644))
				}
			}
		}
	}
}

// widest names what sticks out.
const widest = `[...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".sheet, nav")).slice(0, 3).map(e => e.outerHTML.slice(0, 120)).join(" | ")`

// faint lists texts whose contrast to their ground is below 4.5 (WCAG 2.2, 1.4.3). A ground that lets through is
// mixed with what is behind it.
const faint = `
function parts(c) { const m = c.match(/[\d.]+/g).map(Number); return m.length > 3 ? m : [...m, 1]; }
function ground(e) {
	let layers = [];
	for (; e; e = e.parentElement) { const c = parts(getComputedStyle(e).backgroundColor); layers.push(c); if (c[3] === 1) break; }
	let c = [255, 255, 255];
	for (const l of layers.reverse()) c = c.map((v, i) => v * (1 - l[3]) + l[i] * l[3]);
	return c;
}
function luminance(c) { const [r, g, b] = c.map(v => { v /= 255; return v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; }); return .2126 * r + .7152 * g + .0722 * b; }
function lightness(c) { return luminance(parts(c).slice(0, 3)); }
[...document.querySelectorAll("body *")].filter(e => {
	if (!e.checkVisibility() || ![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) return false;
	if (e.closest("script, style, noscript")) return false;
	const a = luminance(parts(getComputedStyle(e).color).slice(0, 3)), b = luminance(ground(e));
	return (Math.max(a, b) + .05) / (Math.min(a, b) + .05) < 4.5;
}).map(e => e.outerHTML.slice(0, 100)).slice(0, 5)`

// serve starts an admin server with options of the test's.
func serve(t testing.TB, o admin.AdminOptions) (*admin.Server, string) {
	t.Helper()
	l := zlog.New(zlog.Options{Writer: io.Discard})
	o.Logging = l
	s, err := admin.NewAdmin(o)
	must(t, err)
	done := make(chan error, 1)
	go func() { done <- s.Serve() }()
	t.Cleanup(func() {
		s.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
		l.Close(context.Background())
	})
	return s, "http://" + s.Addrs()[0].String() + "/"
}

// busyNode has something of everything, named by x where others name it.
func busyNode(x string) admin.AdminOptions {
	now := time.Now()
	side := func(name string, i int) admin.Side {
		return admin.Side{Address: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, 0, byte(i)}), uint16(40000+i)),
			Workload: name + x, Namespace: "default", Identity: "spiffe://cluster.local/ns/default/sa/" + name + x}
	}
	var live, ended []admin.Connection
	for i := range 12 {
		c := admin.Connection{Pod: "default/web-" + fmt.Sprint(i%3) + x, Direction: "outbound", Protocol: "HBONE",
			State: "open", Source: side("web", i), Destination: side("shop", 100+i),
			Service: "shop.default.svc.cluster.local", Start: now.Add(-time.Duration(i*i) * time.Second),
			Sent: uint64(i) << (3 * i), Received: 1 << (2 * i)}
		c.Tunnel = admin.Tunnel{Local: netip.AddrPortFrom(c.Source.Address.Addr(), 33000),
			Remote: netip.AddrPortFrom(c.Destination.Address.Addr(), 15008)}
		if i%5 == 4 {
			c.Direction, c.Protocol, c.Tunnel, c.Destination.Identity, c.Source.Identity, c.Service = "passthrough", "TCP",
				admin.Tunnel{}, "", "", ""
		}
		live = append(live, c)
		c.State, c.End = "ended", now.Add(-time.Duration(i)*time.Minute)
		c.Outcome = []string{"denied", "failed", "cut", "success"}[i%4]
		c.Reason = []string{"connection closed due to policy rejection: explicitly denied by: default/no-web" + x,
			"io error: dial tcp 10.1.0.101:15008: connect: connection refused" + x, "connection closed due to policy change" + x,
			""}[i%4]
		ended = append(ended, c)
	}
	seq := func(all []admin.Connection) func(func(admin.Connection) bool) {
		return func(yield func(admin.Connection) bool) {
			for _, c := range all {
				if !yield(c) {
					return
				}
			}
		}
	}
	var n uint64
	pod := func(i int, state, err string) admin.OverviewPod {
		return admin.OverviewPod{PodStatus: admin.PodStatus{PodSpec: admin.PodSpec{Name: fmt.Sprintf("web-%d%s", i, x),
			Namespace: "default", ServiceAccount: "web",
			IPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 1, 0, byte(i)}), netip.MustParseAddr("fd00:1::2")}}, State: state,
			Error: err, Device: "ztun0",
			Offload:     admin.PodOffload{VNetHdr: true, CSum: true, TSO4: true, TSO6: true},
			Connections: admin.PodConnections{Inbound: i, Outbound: 3 * i}}, Tunnels: i, Streams: 2 * i, DialFailures: uint64(
			i % 2), Memory: int64(i) << 18}
	}
	return admin.AdminOptions{
		Connections: admin.ConnectionSource{Live: seq(live), Ended: seq(ended)}, Ready: admin.NewReady(nil),
		Dump: func() map[string]admin.Section {
			return nil
		},
		Meter: admin.NewMeter(func() (out, in admin.Traffic) {
			n += 7
			return admin.Traffic{Opened: n * 3, Failed: n / 20, Bytes: n * n * 1000}, admin.Traffic{Opened: n}
		}),
		Overview: func() admin.Overview {
			return admin.Overview{Node: "worker-1" + x, Version: "0.8.0", Started: now.Add(-50 * time.Hour),
				Source: "https://istiod.istio-system.svc:15012" + x, Connected: true,
				Workloads: 12345, Services: 678, Policies: 3, Memory: 3 << 20, MemoryBudget: 1 << 30,
				Pods: []admin.OverviewPod{pod(1, "Up", ""), pod(2, "Up", ""),
					pod(3, "Pending", "the network namespace /var/run/netns/web-3 is gone"+x)},
				Certificates: []admin.OverviewCertificate{{Identity: "spiffe://cluster.local/ns/default/sa/web" + x,
					State: "Available", From: now.Add(-6 * time.Hour), Until: now.Add(18 * time.Hour)},
					{Identity: "spiffe://cluster.local/ns/default/sa/shop" + x, State: "Available", From: now.Add(-23 * time.Hour),
						Until: now.Add(time.Hour)},
					{Identity: "spiffe://cluster.local/ns/default/sa/late" + x,
						State: "Unavailable: the certificate authority does not answer" + x}},
				Rules: []admin.OverviewPolicy{{Namespace: "default", Name: "no-web" + x, Scope: "Namespace", Action: "Deny",
					Rules: 2}, {Namespace: "istio-system", Name: "mesh" + x, Scope: "Global", Action: "Allow", DryRun: true,
					Rules: 1}},
				Missing: []admin.OverviewMissing{{Policy: "default/strict" + x, Workload: "default/web-1" + x, Decision: "skip",
					Since: now.Add(-time.Minute)}}}
		},
	}
}

// TestNodePage: the page of a busy node, in each light and width, without a complaint of the browser's; it follows
// what happens, its buttons work, and it says when the daemon is gone.
func TestNodePage(t *testing.T) {
	b := open(t)
	o := busyNode("")
	quit := make(chan string, 1)
	o.Quit = func(reason string) { quit <- reason }
	meter, stop := context.WithCancel(context.Background())
	measured := make(chan error, 1)
	go func() { measured <- o.Meter.Run(meter) }()
	defer func() { stop(); <-measured }()
	started := time.Now()
	base := o.Overview
	o.Overview = func() admin.Overview {
		v := base()
		v.Workloads = int(time.Since(started).Seconds()) + 1000
		return v
	}
	s, url := serve(t, o)
	b.looks(url, "node", "light", "dark")

	// Live: a number changes without a reload, and what one has selected stays.
	eval[bool](b, `window.stays = true`)
	before := eval[string](b, `document.getElementById("cards").textContent`)
	b.eventually("the page follows", fmt.Sprintf(`window.stays && document.getElementById("cards").textContent !== %q`,
		before))
	b.do(click("#pause"))
	paused := eval[string](b, `document.getElementById("who").textContent`)
	time.Sleep(3 * time.Second)
	if now := eval[string](b, `document.getElementById("who").textContent`); now != paused {
		t.Errorf("paused: %q, then %q", paused, now)
	}
	b.do(click("#pause"))

	// Buttons post, with an answer in the page. Shutting down asks first.
	b.do(click(`button[formaction="/logging?level=debug"]`))
	b.eventually("the level changes", `document.getElementById("said").textContent.includes("debug")`)
	b.quiet("level")
	b.do(click(`button.stop`)) // the dialog is answered with no
	if asked := b.complaints(); len(asked) != 1 || !strings.HasPrefix(asked[0], "dialog: Shut ztun down") {
		t.Errorf("asked: %q", asked)
	}
	select {
	case <-quit:
		t.Error("shut down though the answer was no")
	default:
	}

	// What the page may not do, its policy forbids.
	for _, attempt := range []string{
		`(() => { const s = document.createElement("script"); s.textContent = "window.ran = true"; document.body.append(s); return !window.ran })()`,
		`(() => { document.body.insertAdjacentHTML("beforeend", "<p onclick='window.ran = true' id=inline>x</p>"); document.getElementById("inline").click(); return !window.ran })()`,
	} {
		if !eval[bool](b, attempt) {
			t.Errorf("not forbidden: %s", attempt)
		}
		if c := b.complaints(); len(c) == 0 {
			t.Errorf("no complaint of the browser's about %s", attempt)
		}
	}

	s.Close()
	b.eventually("the end is told", `!document.getElementById("stale").hidden && document.body.classList.contains("old")`)
}

// TestNodePageToken: with a token for changes, the button is refused until it is given.
func TestNodePageToken(t *testing.T) {
	b := open(t)
	o := busyNode("")
	o.Token = filepath.Join(t.TempDir(), "token")
	must(t, os.WriteFile(o.Token, []byte("s3cret\n"), 0o600))
	_, url := serve(t, o)
	b.do(chromedp.Navigate(url), click(`button[formaction="/logging?level=debug"]`))
	b.eventually("it is refused", `document.getElementById("said").textContent.includes("needs the token")`)
	b.do(chromedp.SendKeys(chromedp.CSS("#token"), "s3cret"), click(`button[formaction="/logging?level=debug"]`))
	b.eventually("it is taken", `document.getElementById("said").textContent.includes("current log level is")`)
}

// TestHostileNames: what peers and the control plane choose is seen as text, and does nothing.
func TestHostileNames(t *testing.T) {
	b := open(t)
	all := strings.Join([]string{`<script>alert(1)</script>`, `"><img src=x onerror=alert(1)>`, `' onmouseover='alert(1)`,
		`</td></table><iframe src=//evil.example></iframe>`,
		`</style></script><svg onload=alert(1)>`, "\u202eturned"}, " ")
	for _, x := range []string{all, strings.Repeat("long", 200)} {
		_, url := serve(t, busyNode(x))
		b.looks(url, "hostile", "dark")
		if n := eval[int](b,
			`document.querySelectorAll("main img, main iframe, main script, [onerror], [onload], [onmouseover]").length`); n !=
			0 {
			t.Errorf("%.30q: %d elements of its making", x, n)
		}
		if shown := eval[string](b, `document.querySelector("h1").textContent`); !strings.HasPrefix(shown, "worker-1") {
			t.Errorf("%.30q: %q", x, shown)
		}
	}
}

// TestWithoutScript: the essentials are there with JavaScript switched off, and a button of a form works.
func TestWithoutScript(t *testing.T) {
	b := open(t)
	_, url := serve(t, busyNode(""))
	tell(b, emulation.SetScriptExecutionDisabled, emulation.SetScriptExecutionDisabledParams{Value: true})
	b.do(chromedp.Navigate(url))
	text := get(b, chromedp.TextContent(chromedp.CSS("main")))
	for _, want := range []string{"explicitly denied by: default/no-web", "default/web-1",
		"spiffe://cluster.local/ns/default/sa/shop", "New connections", "not loaded"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not on the page", want)
		}
	}
	b.do(click(`button[formaction="/logging?level=debug"]`))
	text = get(b, chromedp.TextContent(chromedp.CSS("pre")))
	if !strings.Contains(text, "current log level is") {
		t.Errorf("the button's answer: %q", text)
	}
}

// TestForeignPage: a page of another origin can neither read the page nor press its buttons nor frame it, though the
// browser is on the node.
func TestForeignPage(t *testing.T) {
	b := open(t)
	o := busyNode("")
	quit := make(chan string, 1)
	o.Quit = func(reason string) { quit <- reason }
	_, url := serve(t, o)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	evil := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		fmt.Fprintf(w, `<!DOCTYPE html><form method="post" action="%squitquitquit"><button id="press">x</button></form>`, url)
	})}
	served := make(chan error, 1)
	go func() { served <- evil.Serve(l) }()
	defer func() {
		evil.Close()
		if err := <-served; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	}()
	b.do(chromedp.Navigate("http://" + l.Addr().String() + "/"))
	read := get(b, chromedp.Evaluate[string](fmt.Sprintf(`fetch(%q).then(r => r.text()).catch(e => "refused: " + e)`, url),
		chromedp.EvalAwaitPromise))
	if !strings.HasPrefix(read, "refused") {
		t.Errorf("a foreign page read %.100q", read)
	}
	b.do(click("#press"))
	text := get(b, chromedp.TextContent(chromedp.CSS("pre")))
	if !strings.Contains(text, "another origin") {
		t.Errorf("a foreign form: %q", text)
	}
	select {
	case <-quit:
		t.Error("a foreign page has shut it down")
	default:
	}
}
