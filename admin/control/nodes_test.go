package control

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	"ztun/tun/replace"
)

// FuzzNode: any file is a node's with a credential, and survives being written again, or it is none.
func FuzzNode(f *testing.F) {
	sum := strings.Repeat("ab", 32)
	f.Add("node-a.json", `{"node":"node-a","created":"2026-11-23T12:00:00Z","tokenSHA256":"`+sum+`","publicKeySHA256":"`+
		sum+`","certificateNotAfter":"2027-11-23T12:00:00Z"}`)
	f.Add("x.json", `{"node":"x"}`)
	f.Add("a~b.json", `{"node":"a/b","workload":"u/b","tokenSHA256":"`+sum+`"}`)
	f.Add("a~b.json", `{"node":"a/b","tokenSHA256":"`+sum+`"}`)
	f.Add(".json", `{"tokenSHA256":"`+sum+`"}`)
	f.Fuzz(func(t *testing.T, name, text string) {
		n, ok := parseNode(name, []byte(text))
		if !ok {
			return
		}
		_, token := parseHash(n.Token)
		_, key := parseHash(n.Key)
		if checkMember(n.Node, n.Workload != "") != nil || !token && !key || filepath.Base(name) != name {
			t.Fatalf("%q: %+v", name, n)
		}
		b, err := json.Marshal(n)
		if err != nil {
			t.Fatal(err)
		}
		again, ok := parseNode(name, b)
		if !ok || again.Token != n.Token || again.Key != n.Key || !again.Expires.Equal(n.Expires) {
			t.Fatalf("%+v became %+v", n, again)
		}
	})
}

// A credential that two files have is the first's; both are there, and the second is reported. What is no file of a
// node is, too.
func TestNodeFiles(t *testing.T) {
	dir := t.TempDir()
	sum := func(c string) string { return strings.Repeat(c, 64) }
	for name, text := range map[string]string{
		"a.json": `{"node":"a","tokenSHA256":"` + sum("a") + `","publicKeySHA256":"` + sum("b") + `"}`,
		"b.json": `{"node":"b","tokenSHA256":"` + sum("a") + `","publicKeySHA256":"` + sum("c") + `"}`,
		"c.json": `{"node":"c"}`,
		"d.json": `{"node":"d","tokenSHA256":"zz"}`,
		"e.json": `{"node":"other","tokenSHA256":"` + sum("e") + `"}`,
		"f.json": `{"node":"f","tokenSHA256":"` + sum("f") + `","x":"` + strings.Repeat("x", maxNodeFile) + `"}`,
	} {
		check(t, replace.File(filepath.Join(dir, name), 0o600, []byte(text)))
	}
	s := newNodeStore(dir)
	s.rescan()
	nodes, problems := s.joined()
	if len(nodes) != 2 || len(problems) != 5 ||
		!strings.Contains(problems[0].String(), "nodes/b.json: has a credential of another node") {
		t.Fatal(nodes, problems)
	}
	h, _ := parseHash(sum("a"))
	node, ok := s.find(h, false)
	equal(t, "the token's", node, "a")
	equal(t, "found", ok, true)
}
