package cni

import (
	"bytes"
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
)

// bridge is a configuration list as people write them.
const bridge = `{
  "cniVersion": "1.0.0",
  "name": "kube",
  "x-unknown": [1e400, "\u0041"],
  "plugins": [
    {"type": "bridge", "bridge": "cni0", "mtu": 1450.0,
     "ipam": {"type": "host-local"}},
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ],
  "disableCheck": true
}
`

func entryForTests() Entry {
	return Entry{Type: PluginType, Socket: "/run/s", Enrolled: "/etc/e", Own: []string{"istio-system/ztun-agent-"}}
}

const entryText = `{"type":"ztun-cni","socket":"/run/s","enrolled":"/etc/e","own":["istio-system/ztun-agent-"]}`

// TestInsert: our entry comes last, once, and nothing else changes by a byte.
func TestInsert(t *testing.T) {
	portmap := `{"type": "portmap", "capabilities": {"portMappings": true}}`
	inserted := strings.Replace(bridge, portmap, portmap+",\n    "+entryText, 1)
	for _, c := range []struct {
		name, conf, want string
		listed           bool
	}{
		{name: "a list", conf: bridge, want: inserted},
		{name: "again", conf: inserted, want: inserted},
		{name: "laid out another way", conf: strings.Replace(inserted, `"type":"ztun-cni"`, "\"type\" :\n\t\"ztun-cni\"", 1),
			want: strings.Replace(inserted, `"type":"ztun-cni"`, "\"type\" :\n\t\"ztun-cni\"", 1)},
		{name: "with another socket", conf: strings.Replace(inserted, "/run/s", "/run/old", 1), want: inserted},
		{name: "with a field of another version", conf: strings.Replace(inserted, `"socket"`, `"x":1,"socket"`, 1), want: inserted},
		{name: "another plugin was put behind it", conf: `{"name":"n","plugins":[{"type":"a"},` + entryText + ` , {"type":"z"}]}`,
			want: `{"name":"n","plugins":[{"type":"a"} , {"type":"z"},` + entryText + `]}`},
		{name: "first and twice", conf: `{"name":"n","plugins":[ ` + entryText + `,` + entryText + `, {"type":"z"} ]}`,
			want: `{"name":"n","plugins":[ {"type":"z"}, ` + entryText + ` ]}`},
		{name: "one plugin", conf: "{\"cniVersion\":\"0.3.1\",\"name\":\"n\",\"type\":\"ptp\",\"x\":1e400}\n", listed: true,
			want: "{\n  \"cniVersion\": \"0.3.1\",\n  \"name\": \"n\",\n  \"plugins\": [\n    " +
				"{\"cniVersion\":\"0.3.1\",\"name\":\"n\",\"type\":\"ptp\",\"x\":1e400},\n    " + entryText + "\n  ]\n}\n"},
		// libcni takes the last of a name, and keys as they are spelt.
		{name: "plugins twice", conf: `{"name":"n","plugins":[{"type":"a"}],"Plugins":3,"plugins":[{"type":"b"}]}`,
			want: `{"name":"n","plugins":[{"type":"a"}],"Plugins":3,"plugins":[{"type":"b"},` + entryText + `]}`},
		{name: "an escaped key", conf: `{"name":"n","pl\u0075gins":[{"type":"a"}]}`,
			want: `{"name":"n","pl\u0075gins":[{"type":"a"},` + entryText + `]}`},
		{name: "plugins of a plugin", conf: `{"name":"n","a":{"plugins":[1]},"plugins":[{"type":"a","plugins":[]}]}`,
			want: `{"name":"n","a":{"plugins":[1]},"plugins":[{"type":"a","plugins":[]},` + entryText + `]}`},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, listed, err := Insert([]byte(c.conf), entryForTests())
			if err != nil {
				t.Fatal(err)
			}
			if string(got) != c.want || listed != c.listed {
				t.Errorf("listed %v, got\n%s\nwant %v\n%s", listed, got, c.listed, c.want)
			}
		})
	}
}

// TestInsertRefuses: what no runtime would take is refused, and the reason is said.
func TestInsertRefuses(t *testing.T) {
	for conf, want := range map[string]string{
		``:                                   "no network configuration: unexpected end of JSON input",
		`[]`:                                 "no network configuration: json: cannot unmarshal array",
		`null`:                               `neither "plugins" nor "type"`,
		`{"name":"n"}`:                       `neither "plugins" nor "type"`,
		`{"type":"bridge"}`:                  `neither "plugins" nor "type" and "name"`,
		`{"plugins":[{"type":"bridge"}]}`:    `no "name"`,
		`{"name":"n","plugins":{}}`:          `"plugins" is no list`,
		`{"name":"n","plugins":null}`:        `"plugins" is no list`,
		`{"name":"n","plugins":[]}`:          "none that makes a network",
		`{"name":"n","plugins":[{}]}`:        `plugin 1 has no "type"`,
		`{"name":"n","plugins":[1]}`:         "plugin 1: json: cannot unmarshal number",
		`{"name":"n","type":"ztun-cni"}`:     "none that makes a network",
		`{"name":"n","plugins":[]} trailing`: "invalid character 't'",
		`{"name":"n","plugins":[{"type":"ztun-cni"}]}`:                "none that makes a network",
		`{"name":"n","type":"a","x":"` + strings.Repeat("y", MaxConf): "larger than",
	} {
		if out, _, err := Insert([]byte(conf), entryForTests()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60s: %q, %v; want an error with %q", conf, out, err, want)
		}
	}
}

// TestRemove undoes Insert to the byte, and takes out what is there more than once.
func TestRemove(t *testing.T) {
	with, _, err := Insert([]byte(bridge), entryForTests())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, conf, want string }{
		{"as it was", string(with), bridge},
		{"not there", bridge, bridge},
		{"not a list", `{"name":"n","type":"ptp"}`, `{"name":"n","type":"ptp"}`},
		{"here and there", `{"name":"n","plugins":[{"type":"ztun-cni"} ,{"type":"a"}, {"type":"ztun-cni"},` +
			`{"type":"ztun-cni"},{"type":"b"}]}`,
			`{"name":"n","plugins":[{"type":"a"},{"type":"b"}]}`},
		{"alone", `{"name":"n","plugins":[ {"type":"ztun-cni"},{"type":"ztun-cni"} ]}`, `{"name":"n","plugins":[  ]}`},
	} {
		if got, err := Remove([]byte(c.conf)); err != nil || string(got) != c.want {
			t.Errorf("%s: %v, got\n%s\nwant\n%s", c.name, err, got, c.want)
		}
	}
	if _, err := Remove([]byte(`{"name":`)); err == nil {
		t.Error("half a file is no error")
	}
}

// others are the plugins of a list but ours, as libcni reads them.
func others(t *testing.T, conf []byte) (list []map[string]any, ours int) {
	t.Helper()
	l, err := libcni.ConfListFromBytes(conf)
	if err != nil {
		t.Fatalf("libcni does not take %q: %v", conf, err)
	}
	for _, p := range l.Plugins {
		if p.Network.Type == PluginType {
			ours++
			continue
		}
		var m map[string]any
		if err := json.Unmarshal(p.Bytes, &m); err != nil {
			t.Fatal(err)
		}
		list = append(list, m)
	}
	return list, ours
}

// FuzzConflist: whatever lies in the directory, what Insert makes of it a runtime takes as before, with our plugin
// last; a second time changes nothing; Remove undoes it.
func FuzzConflist(f *testing.F) {
	f.Add([]byte(bridge))
	f.Add([]byte(`{"cniVersion":"0.3.1","name":"n","type":"ptp"}`))
	f.Fuzz(func(t *testing.T, conf []byte) {
		given := bytes.Clone(conf)
		e := entryForTests()
		out, listed, err := Insert(conf, e)
		if !bytes.Equal(conf, given) {
			t.Fatal("the text that was given is changed")
		}
		gone, rerr := Remove(conf)
		if err != nil {
			return
		}
		if rerr != nil {
			t.Fatalf("can be inserted but not removed: %v", rerr)
		}
		l, err := parse(out)
		if err != nil {
			t.Fatalf("%q is no list: %v", out, err)
		}
		if n := len(l.plugins); !l.ours[n-1] || l.kept != n-1 {
			t.Fatalf("not last, or not once: %q", out)
		}
		if again, _, err := Insert(out, e); err != nil || !bytes.Equal(again, out) {
			t.Fatalf("a second time: %v\n%q\n%q", err, out, again)
		}
		back, err := Remove(out)
		if err != nil {
			t.Fatal(err)
		}
		if !listed && !bytes.Equal(back, gone) {
			t.Fatalf("not undone:\n%q\n%q", back, gone)
		}
		// What libcni takes without ours (it is stricter about what does not concern us), it takes with it.
		if listed {
			gone = back
		}
		if _, err := libcni.ConfListFromBytes(gone); err != nil {
			return
		}
		before, _ := others(t, gone)
		after, ours := others(t, out)
		if ours != 1 || !reflect.DeepEqual(before, after) {
			t.Fatalf("%d of ours; before %v, after %v", ours, before, after)
		}
	})
}
