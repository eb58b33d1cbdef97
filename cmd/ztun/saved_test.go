package main

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"ztun/admin"
)

const savedA = `{"name":"a","namespace":"ns","serviceAccount":"sa","netns":"/run/netns/a","ips":["10.0.0.1","fd00::1"],"netnsDev":4,"netnsIno":4026532001}`

// One pod that cannot be read does not take the others of the list with it.
func TestOneBadPod(t *testing.T) {
	b := strings.NewReplacer(`"a"`, `"b"`, "10.0.0.1", "10.0.0.2", "fd00::1", "fd00::2").Replace(savedA)
	for _, bad := range []string{`null`, `3`, `{}`, strings.Replace(savedA, "10.0.0.1", "10.0.0", 1),
		strings.Replace(savedA, `"a"`, `"../a"`, 1), savedA} {
		specs, err := readSaved([]byte("[" + savedA + "," + bad + "," + b + "]"))
		if len(specs) != 2 || specs[0].Name != "a" || specs[1].Name != "b" || err == nil ||
			!strings.Contains(err.Error(), "pod 2 of 3") {
			t.Errorf("%s: %v, %v", bad, specs, err)
		}
	}
	if specs, err := readSaved([]byte("{")); specs != nil || err == nil {
		t.Errorf("no list: %v, %v", specs, err)
	}
}

// FuzzSavedPods: what is read of any pods.json are valid pods, each once, and reading what would be saved of them
// gives the same.
func FuzzSavedPods(f *testing.F) {
	f.Add("[" + savedA + "]")
	f.Add("[" + savedA + "," + savedA + ",null,{}]")
	f.Add("null")
	f.Fuzz(func(t *testing.T, text string) {
		specs, _ := readSaved([]byte(text))
		seen := map[admin.PodRef]bool{}
		for _, s := range specs {
			if err := s.Validate(); err != nil || seen[refOf(s.PodSpec)] {
				t.Fatalf("%+v: %v, seen %v", s, err, seen[refOf(s.PodSpec)])
			}
			seen[refOf(s.PodSpec)] = true
		}
		b, err := json.Marshal(specs)
		if err != nil {
			t.Fatal(err)
		}
		again, err := readSaved(b)
		if err != nil || !reflect.DeepEqual(again, specs) {
			t.Fatalf("%+v became %+v (%v)", specs, again, err)
		}
	})
}

// A long line is skipped, and what follows it is read.
func TestResolvConfLongLine(t *testing.T) {
	r := parseResolvConf("# " + strings.Repeat("x", 100_000) +
		"\nnameserver 10.0.0.53\nsearch a.b \xff\nnameserver ::ffff:10.0.0.54\n")
	if got := fmt.Sprint(r.addrs()); got != "[10.0.0.53:53 10.0.0.54:53]" || len(r.search) != 0 {
		t.Errorf("%s, search %q", got, r.search)
	}
	if r := parseResolvConf(strings.Repeat("nameserver 10.0.0.1\n", 1000) + "search" + strings.Repeat(" x", 1000)); len(
		r.nameservers) != maxNameservers || len(r.search) != maxSearch {
		t.Errorf("%d nameservers, %d domains", len(r.nameservers), len(r.search))
	}
}

// FuzzResolvConf: any text gives addresses that can be asked and a dump that is JSON, and lines that mean nothing
// change nothing.
func FuzzResolvConf(f *testing.F) {
	f.Add("nameserver 10.0.0.53\nnameserver fe80::1%eth0\nsearch a.b c.d\noptions ndots:5 timeout:2 attempts:x\n")
	f.Add("domain x\r\n;nameserver 1.1.1.1\n\tnameserver ::1")
	f.Fuzz(func(t *testing.T, text string) {
		r := parseResolvConf(text)
		for _, a := range r.addrs() {
			if !a.IsValid() || a.Port() != dnsPort || a.Addr().Is4In6() {
				t.Fatal(a)
			}
		}
		if r.ndots < 0 || r.timeout < 0 || r.attempts < 0 {
			t.Fatalf("%+v", r)
		}
		for _, s := range append(slices.Clone(r.search), r.domain) {
			if !utf8.ValidString(s) || strings.ContainsAny(s, " \n") {
				t.Fatalf("%q is not UTF-8", s)
			}
		}
		for _, s := range r.nameservers {
			if _, err := netip.ParseAddr(s); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := json.Marshal([]any{r.servers(), r.options(true)}); err != nil {
			t.Fatal(err)
		}
		if again := parseResolvConf("# x\n\n" + text + "\nunknown thing\n"); !reflect.DeepEqual(again, r) {
			t.Fatalf("%+v became %+v", r, again)
		}
	})
}
