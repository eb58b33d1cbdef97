package main

import (
	"reflect"
	"regexp"
	"strings"
	"testing"
)

// covers fails for numeric fields of S that no family of the table shows, for families that show no field, and for
// names and helps that are not as they should be.
func covers[S any](t *testing.T, table families[S], seen map[string]bool) {
	t.Helper()
	var s S
	v := reflect.ValueOf(&s).Elem()
	shown := map[string]string{}
	for i := range v.NumField() {
		field := v.Type().Field(i)
		v.SetZero()
		switch field.Type.Kind() {
		case reflect.Uint64:
			v.Field(i).SetUint(1)
		case reflect.Int:
			v.Field(i).SetInt(1)
		case reflect.Bool:
			v.Field(i).SetBool(true)
		default:
			continue
		}
		n := 0
		for _, f := range table.list {
			if f.get(&s) == 1 {
				n++
				shown[f.name] = field.Name
			}
		}
		if n != 1 {
			t.Errorf("%s.%s is shown by %d metrics, want 1", v.Type(), field.Name, n)
		}
	}
	for _, f := range table.list {
		if shown[f.name] == "" {
			t.Errorf("%s shows no field of %s", f.name, v.Type())
		}
		if seen[f.name] {
			t.Errorf("%s is there twice", f.name)
		}
		seen[f.name] = true
		if !regexp.MustCompile(`^ztun(_[a-z0-9]+)+$`).MatchString(f.name) {
			t.Errorf("%s is no name for a metric of ours", f.name)
		}
		if !strings.HasSuffix(f.help, ".") {
			t.Errorf("%s: the help %q is no sentence", f.name, f.help)
		}
	}
}

// A counter that one of the parts gains has to be given a name: what dashboards rely on is not derived from Go's names.
func TestMetricTablesCoverTheParts(t *testing.T) {
	m, seen := newMetricTables(), map[string]bool{}
	covers(t, m.device, seen)
	covers(t, m.stack, seen)
	covers(t, m.proxy, seen)
	covers(t, m.pool, seen)
	covers(t, m.tunnel, seen)
	covers(t, m.certificates, seen)
	covers(t, m.policies, seen)
	covers(t, m.hostnames, seen)
	covers(t, m.authority, seen)
	covers(t, m.crl, seen)
	covers(t, m.revocation, seen)
	covers(t, m.agent, seen)
}
