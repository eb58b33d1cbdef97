package identity

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	for _, c := range []struct {
		in   string
		want ID
		ok   bool
	}{
		{"spiffe://cluster.local/ns/default/sa/a", ID{"cluster.local", "default", "a"}, true},
		{"spiffe:///ns//sa/", ID{}, true}, // empty parts are accepted
		{"spiffe://td/ns/n/sa/b?x=%2F#y", ID{"td", "n", "b?x=%2F#y"}, true},
		{"spiffe://TD/ns/N/sa/S", ID{"TD", "N", "S"}, true},
		{"spiffe://td/ns/n/sa/s/", ID{}, false},
		{"spiffe://td/ns/n/sa", ID{}, false},
		{"spiffe://td/ns/n/sb/s", ID{}, false},
		{"spiffe://td/NS/n/sa/s", ID{}, false},
		{"SPIFFE://td/ns/n/sa/s", ID{}, false},
		{"spiffe:/td/ns/n/sa/s", ID{}, false},
		{"spiffe://td", ID{}, false},
		{"https://td/ns/n/sa/s", ID{}, false},
		{" spiffe://td/ns/n/sa/s", ID{}, false},
		{"", ID{}, false},
	} {
		got, err := Parse(c.in)
		if got != c.want || (err == nil) != c.ok {
			t.Errorf("Parse(%q) = %+v, %v", c.in, got, err)
		}
		if pe := new(ParseError); err != nil && (!errors.As(err, &pe) || err.Error() != "invalid spiffe identity: "+c.in) {
			t.Errorf("Parse(%q): %v", c.in, err)
		}
		if c.ok && got.String() != c.in {
			t.Errorf("%q printed as %q", c.in, got)
		}
	}
}

func TestIDText(t *testing.T) {
	id := ID{"td", "n", "s"}
	b, err := json.Marshal(map[string]ID{"id": id})
	if err != nil || string(b) != `{"id":"spiffe://td/ns/n/sa/s"}` {
		t.Fatalf("%s, %v", b, err)
	}
	var back map[string]ID
	if err := json.Unmarshal(b, &back); err != nil || back["id"] != id {
		t.Fatalf("%v, %v", back, err)
	}
	if err := json.Unmarshal([]byte(`{"id":"x"}`), &back); err == nil {
		t.Fatal("accepted")
	}
	if got := Join([]ID{id, {}}); got != "spiffe://td/ns/n/sa/s,spiffe:///ns//sa/" || Join(nil) != "" {
		t.Fatal(got)
	}
	if id.IsZero() || !(ID{}).IsZero() {
		t.Fatal("IsZero")
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"spiffe://cluster.local/ns/default/sa/a", "spiffe:///ns//sa/", "spiffe://td/ns/n/sa/s/",
		"spiffe://td/ns/n", "", "spiffe://\x00/ns/\xff/sa/é"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := Parse(s)
		// The rule as the spec words it.
		rest, found := strings.CutPrefix(s, "spiffe://")
		parts := strings.Split(rest, "/")
		ok := found && len(parts) == 5 && parts[1] == "ns" && parts[3] == "sa"
		if ok != (err == nil) {
			t.Fatalf("Parse(%q) = %v, %v", s, id, err)
		}
		if err != nil {
			return
		}
		if want := (ID{parts[0], parts[2], parts[4]}); id != want || id.String() != s {
			t.Fatalf("Parse(%q) = %+v", s, id)
		}
		ext, err := SANExtension(id)
		ascii := !slices.ContainsFunc([]byte(s), func(b byte) bool { return b >= 0x80 })
		if (err == nil) != ascii {
			t.Fatalf("SANExtension(%q): %v", s, err)
		}
		if err == nil && !slices.Equal(URIs(append(extensions(), ext)), []string{s}) {
			t.Fatalf("SANExtension(%q) = %x", s, ext.Value)
		}
	})
}
