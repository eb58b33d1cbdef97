package suggest

import (
	"strings"
	"testing"
)

func TestClosest(t *testing.T) {
	known := []string{"workloadIps", "workloadName", "services", "list", "add", "del", "reset", "service-account",
		"LOCAL_XDS_PATH"}
	for word, want := range map[string]string{
		"workloadIPs": "workloadIps", "workloadIp": "workloadIps", "workload_ips": "workloadIps",
		"worklaodIps": "workloadIps",
		"lst":         "list", "lsit": "list", "adn": "add", "rest": "reset", "serviceaccount": "service-account",
		"sevices":        "services",
		"local-xds-path": "LOCAL_XDS_PATH",
		"":               "", "xyz": "", "l": "", "remove": "", "-": "", strings.Repeat("list", 100): "",
	} {
		if got := Closest(word, known); got != want {
			t.Errorf("%q: %q, want %q", word, got, want)
		}
	}
	if got := DidYouMean("lst", known); got != `; did you mean "list"?` {
		t.Error(got)
	}
	if got := DidYouMean("nothing like it", known); got != "" {
		t.Error(got)
	}
}

func FuzzClosest(f *testing.F) {
	f.Add("lst", "list")
	f.Fuzz(func(t *testing.T, a, b string) {
		if len(a) > 200 || len(b) > 200 {
			t.Skip()
		}
		if d, e := distance(a, b), distance(b, a); d != e || (d == 0) != (a == b) || d > max(len(a), len(b)) {
			t.Errorf("distance of %q and %q: %d, %d", a, b, d, e)
		}
		Closest(a, []string{b})
	})
}
