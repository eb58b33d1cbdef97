package hbone

import (
	"net/netip"
	"strings"
	"testing"
)

func TestBaggage(t *testing.T) {
	full := Baggage{Cluster: "Kubernetes", Namespace: "default", WorkloadType: "deployment", Workload: "b-deploy",
		Canonical: "b", Revision: "v2", Region: "r1", Zone: "z1"}
	if got := full.Format(); got != sampleBaggage {
		t.Error(got)
	}
	if got := ParseBaggage([]string{sampleBaggage}); got != full {
		t.Errorf("%+v", got)
	}
	if got := (Baggage{}).Format(); got != "" {
		t.Error(got)
	}
	for _, tc := range []struct {
		lines []string
		want  Baggage
	}{
		{nil, Baggage{}},
		{[]string{"=;,;;x"}, Baggage{}},
		{[]string{"service.name=a", "service.name=b"}, Baggage{Canonical: "b"}},
		{[]string{"service.name=a,service.name="}, Baggage{}},
		{[]string{"service.name=a=b=c"}, Baggage{Canonical: "a"}},
		{[]string{" service.name=a,service.version= v"}, Baggage{Revision: " v"}},
		{[]string{"service.name=a", "cloud.region=\xc3\xa9"}, Baggage{}},
		{[]string{"k8s.cronjob.name=c"}, Baggage{WorkloadType: "cronjob", Workload: "c"}},
		{[]string{"k8s.job.name=j,k8s.pod.name=p"}, Baggage{WorkloadType: "pod", Workload: "p"}},
		{[]string{"k8s.statefulset.name=s"}, Baggage{}},
	} {
		if got := ParseBaggage(tc.lines); got != tc.want {
			t.Errorf("%q: %+v", tc.lines, got)
		}
	}
}

func TestForwarded(t *testing.T) {
	if got := FormatForwarded(netip.MustParseAddrPort("[::1]:80"), ""); got != `for="[::1]:80"` {
		t.Error(got)
	}
	if got := FormatForwarded(netip.MustParseAddrPort("127.0.0.1:80"), "example.com"); got !=
		`for="127.0.0.1:80";host=example.com` {
		t.Error(got)
	}
	for v, want := range map[string]string{
		"": "", "host=": "", `host=""`: "", `host="a.b"`: "a.b", "host=a.b": "a.b", `host="a`: "a", `host=a"`: "a",
		`for="1.2.3.4:5"; host=x;host=y`: "x", "Host=x": "", "for=a,host=x": "", "host=\xff": "", `for="nonsense`: "",
		`host=""a""`: `"a"`,
	} {
		if got := ParseForwardedHost(v); got != want {
			t.Errorf("%q: %q", v, got)
		}
	}
}

func TestTraceparent(t *testing.T) {
	a, b := NewTraceparent(), NewTraceparent()
	if a == b || len(a) != 55 || !strings.HasPrefix(a, "00-") || !strings.HasSuffix(a, "-00") {
		t.Error(a, b)
	}
	for v, want := range map[string]bool{
		a: true, "00-45b1eba1ea39085b19db494968a9f08b-426352cc06ebb3ec-00": true, "": false, "zz": false,
		strings.Repeat("a", 55): false, strings.Repeat("-", 55): false, strings.Replace(a, "-", "x", 1): false,
		"00-45b1eba1ea39085b19db494968a9f08g-426352cc06ebb3ec-00": false, "zz" + a[2:]: false, a + "0": false,
	} {
		if _, ok := ParseTraceparent(v); ok != want {
			t.Errorf("%q: %v", v, ok)
		}
	}
}

func FuzzBaggage(f *testing.F) {
	f.Add(sampleBaggage, "")
	f.Add("=;,;;x", "service.name=a=b,service.name=")
	f.Add("k8s.pod.name=\xff", "k8s.pod.name=x")
	f.Fuzz(func(t *testing.T, a, b string) {
		got := ParseBaggage([]string{a, b})
		if again := ParseBaggage([]string{got.Format()}); again != got {
			t.Errorf("%+v became %+v", got, again)
		}
		if got != (Baggage{}) && (!visibleASCII(a) || !visibleASCII(b)) {
			t.Error("non-ASCII was taken")
		}
	})
}

func FuzzForwarded(f *testing.F) {
	f.Add(`for="10.91.1.2:25036";host=b.default.svc.cluster.local`)
	f.Add(`for="nonsense`)
	f.Add(` host="";host=`)
	f.Fuzz(func(t *testing.T, v string) {
		if host := ParseForwardedHost(v); !visibleASCII(host) || strings.Contains(host, ";") || len(host) > len(v) {
			t.Errorf("%q", host)
		}
	})
}

func FuzzTraceparent(f *testing.F) {
	f.Add("00-45b1eba1ea39085b19db494968a9f08b-426352cc06ebb3ec-00")
	f.Add("zz")
	f.Add(strings.Repeat("0", 55))
	f.Fuzz(func(t *testing.T, v string) {
		tp, ok := ParseTraceparent(v)
		if ok && tp.String()[2:] != strings.ToLower(v[2:]) {
			t.Errorf("%q became %q", v, tp.String())
		}
	})
}
