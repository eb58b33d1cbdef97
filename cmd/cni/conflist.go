package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
)

// PluginType is the plugin's type in a network configuration, which is the name of its program.
const PluginType = "ztun-cni"

// MaxConf is the largest network configuration that is read, in bytes.
const MaxConf = 1 << 20

// Entry is the plugin's part of a network configuration.
type Entry struct {
	Type string `json:"type"`
	// Socket is the path of the agent's socket, Enrolled that of the file Enrolled, both as the node sees them.
	Socket   string `json:"socket"`
	Enrolled string `json:"enrolled"`
	// Own are the pods of ztun's own, namespace/prefix of their names: they start without an agent.
	Own []string `json:"own,omitempty"`
}

// span is a part of a text: [start, end).
type span struct{ start, end int }

// conflist is where things are in the text of a configuration list.
type conflist struct {
	open    int    // behind the [ of plugins
	plugins []span // its elements
	ours    []bool // which of them are PluginType
	kept    int    // how many are not
}

// errNoList: a configuration is that of one plugin.
var errNoList = errors.New("not a list of plugins")

// Insert puts the plugin last into a network configuration and takes former entries of it out. Where it stands there
// already conf itself comes back; all that is not ours stays as it was, to the byte. A configuration of one plugin
// becomes a list: then listed is true, and the file needs another name. An error says why no runtime would take conf.
func Insert(conf []byte, e Entry) (out []byte, listed bool, _ error) {
	e.Type = PluginType
	entry, err := json.Marshal(e)
	if err != nil {
		return nil, false, err
	}
	l, err := parse(conf)
	if errors.Is(err, errNoList) {
		listed = true
		if conf, err = list(conf); err == nil {
			l, err = parse(conf)
		}
	}
	if err != nil {
		return nil, false, err
	}
	if l.kept == 0 {
		return nil, false, errors.New(`"plugins" has none that makes a network`)
	}
	n := len(l.plugins)
	if last := l.plugins[n-1]; l.ours[n-1] && l.kept == n-1 && says(conf[last.start:last.end], entry) {
		return conf, listed, nil
	}
	conf = l.without(conf)
	if l, err = parse(conf); err != nil {
		return nil, false, err
	}
	indent := conf[l.open:l.plugins[0].start]
	at := l.plugins[len(l.plugins)-1].end
	return bytes.Join([][]byte{conf[:at], {','}, indent, entry, conf[at:]}, nil), listed, nil
}

// says reports whether text means entry, however it is laid out: others that write the file lay it out their way.
func says(text, entry []byte) bool {
	var e Entry
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if d.Decode(&e) != nil {
		return false
	}
	b, err := json.Marshal(e)
	return err == nil && bytes.Equal(b, entry)
}

// Remove takes the plugin's entries out of a network configuration; conf itself comes back where there are none.
func Remove(conf []byte) ([]byte, error) {
	l, err := parse(conf)
	if errors.Is(err, errNoList) {
		return conf, nil
	}
	if err != nil {
		return nil, err
	}
	if l.kept == len(l.plugins) {
		return conf, nil
	}
	return l.without(conf), nil
}

// without is the text without our entries, each with the comma before it, or behind it where nothing is left before.
func (l conflist) without(conf []byte) []byte {
	out := make([]byte, 0, len(conf))
	from, kept := 0, false
	for i, p := range l.plugins {
		switch {
		case !l.ours[i]:
			kept = true
			continue
		case kept:
			p.start = l.plugins[i-1].end
		case i+1 < len(l.plugins):
			p.end = l.plugins[i+1].start
		}
		out = append(out, conf[from:p.start]...)
		from = p.end
	}
	return append(out, conf[from:]...)
}

// parse finds the plugins of a configuration list. As for libcni, a key counts as it is spelt, and the last one of a
// name.
func parse(conf []byte) (conflist, error) {
	if len(conf) > MaxConf {
		return conflist{}, fmt.Errorf("larger than %d bytes", MaxConf)
	}
	var head map[string]json.RawMessage // keys as they are spelt
	if err := json.Unmarshal(conf, &head); err != nil {
		return conflist{}, fmt.Errorf("no network configuration: %w", err)
	}
	if _, is := head["plugins"]; !is {
		return conflist{}, errNoList
	}
	var name string
	if json.Unmarshal(head["name"], &name) != nil || name == "" {
		return conflist{}, errors.New(`no network configuration: no "name"`)
	}
	d := json.NewDecoder(bytes.NewReader(conf))
	if _, err := d.Token(); err != nil { // {
		return conflist{}, err
	}
	var l conflist
	for d.More() {
		key, err := d.Token()
		if err != nil {
			return conflist{}, err
		}
		var skipped json.RawMessage
		if key != "plugins" {
			if err := d.Decode(&skipped); err != nil {
				return conflist{}, err
			}
			continue
		}
		if l, err = elements(d); err != nil {
			return conflist{}, err
		}
	}
	return l, nil
}

// elements reads the list of plugins that comes next.
func elements(d *json.Decoder) (conflist, error) {
	var l conflist
	if t, err := d.Token(); err != nil || t != json.Delim('[') {
		return conflist{}, errors.New(`"plugins" is no list`)
	}
	l.open = int(d.InputOffset())
	for d.More() {
		var text json.RawMessage
		if err := d.Decode(&text); err != nil {
			return conflist{}, err
		}
		var plugin struct{ Type string }
		if err := json.Unmarshal(text, &plugin); err != nil {
			return conflist{}, fmt.Errorf("plugin %d: %w", len(l.plugins)+1, err)
		}
		if plugin.Type == "" {
			return conflist{}, fmt.Errorf(`plugin %d has no "type"`, len(l.plugins)+1)
		}
		end := int(d.InputOffset())
		l.plugins = append(l.plugins, span{end - len(text), end})
		l.ours = append(l.ours, plugin.Type == PluginType)
		if plugin.Type != PluginType {
			l.kept++
		}
	}
	_, err := d.Token() // ]
	return l, err
}

// list makes a list of the configuration of one plugin.
func list(conf []byte) ([]byte, error) {
	var one struct{ CNIVersion, Name, Type string }
	if err := json.Unmarshal(conf, &one); err != nil {
		return nil, fmt.Errorf("no network configuration: %w", err)
	}
	if one.Type == "" || one.Name == "" {
		return nil, errors.New(`no network configuration: neither "plugins" nor "type" and "name"`)
	}
	name, _ := json.Marshal(one.Name) // a string is always marshalled
	version, _ := json.Marshal(one.CNIVersion)
	return fmt.Appendf(nil, "{\n  \"cniVersion\": %s,\n  \"name\": %s,\n  \"plugins\": [\n    %s\n  ]\n}\n",
		version, name, bytes.TrimSpace(conf)), nil
}
