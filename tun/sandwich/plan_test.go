package sandwich

import (
	"encoding/json"
	"errors"
	"flag"
	"net/netip"
	"os"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the golden files")

// The plans of both families of CNI, and of what cannot have tc, as a person would type them.
func TestPlans(t *testing.T) {
	keep := []Conn{{netip.MustParseAddrPort("10.92.1.2:40000"), netip.MustParseAddrPort("10.92.2.2:80"), 0}}
	for _, c := range []struct {
		name, facts string
		config      Config
	}{
		{"bridge", "bridge", Config{DNS: true, Native: true, Keep: keep}},
		{"routed", "routed", Config{DNS: true, Native: true}},
		{"copied", "routed", Config{DNS: true}},
		{"rules", "bridge", Config{DNS: true, Native: true, Keep: keep}},
		{"rules-copied", "routed", Config{DNS: true}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var f Facts
			b, err := os.ReadFile("testdata/" + c.facts + ".json")
			if err != nil {
				t.Fatal(err)
			}
			if err := json.Unmarshal(b, &f); err != nil {
				t.Fatal(err)
			}
			plan, undo := New, Undo
			if strings.HasPrefix(c.name, "rules") {
				plan, undo = Rules, UndoRules
			}
			p, err := plan(f, c.config)
			if err != nil {
				t.Fatal(err)
			}
			golden(t, c.name+".plan", p.String())
			golden(t, strings.Replace(c.name, "copied", "routed", 1)+".undo", undo(f).String())
		})
	}
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := "testdata/" + name
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs (-update writes it):\n%s", file, got)
	}
}

// What no plan can be made of is said.
func TestUnfit(t *testing.T) {
	a, b := netip.MustParsePrefix("10.92.1.2/24"), netip.MustParsePrefix("10.92.1.3/24")
	for _, addrs := range [][]Addr{nil, {{Prefix: netip.MustParsePrefix("fe80::2/64")}}, {{Prefix: a}, {Prefix: b}}} {
		if _, err := New(Facts{Dev: "eth0", Addrs: addrs}, Config{}); !errors.Is(err, ErrUnfit) {
			t.Errorf("%v: %v", addrs, err)
		}
	}
}
