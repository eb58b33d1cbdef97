package main

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestVariants(t *testing.T) {
	for _, c := range []struct {
		name string
		o    options
		want []variant
	}{
		{"alone", options{Bin: "/b", Env: []string{"A=1"}}, []variant{{ztunName, "/b/ztun", []string{"A=1"}, ""}}},
		{"none", options{Bin: "/b", NoDaemon: true}, nil},
		{"another build", options{Bin: "/b", Env: []string{"A=1"}, Versus: "/x/z"},
			[]variant{{ztunName, "/b/ztun", []string{"A=1"}, ""}, {otherName, "/x/z", []string{"A=1"}, ""}}},
		{"other settings", options{Bin: "/b", Env: []string{"A=1"}, VersusEnv: []string{"A=2"}},
			[]variant{{ztunName, "/b/ztun", []string{"A=1"}, ""}, {otherName, "/b/ztun", []string{"A=1", "A=2"}, ""}}},
	} {
		b := &bench{o: c.o}
		if d := cmp.Diff(c.want, b.variants(), cmp.AllowUnexported(variant{})); d != "" {
			t.Errorf("%s:\n%s", c.name, d)
		}
	}
}

// TestPlanNamesItsSubjects: every target and reference of the table concerns a subject that is measured.
func TestPlanNamesItsSubjects(t *testing.T) {
	o, err := parseArgs([]string{"--versus-env", "A=b"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{o: o}
	for _, ks := range [][]kase{b.meshCases(), b.localCases(), b.connsCases(), b.echoCases(), b.mixedCases(),
		b.idleCases()} {
		for _, k := range ks {
			names := map[string]bool{}
			for _, s := range k.subjects {
				names[s.name] = true
			}
			if len(names) != 3 || len(names) != len(k.subjects) || k.subjects[0].name != bareVeth || k.lasts <= 0 {
				t.Errorf("%s, %s: %v", k.suite, k.name, names)
			}
			for _, w := range k.rows {
				if (w.Target != nil || w.Reference != "") && !names[w.Subject] {
					t.Errorf("%s, %s, %s: nobody is %q", k.suite, k.name, w.Metric, w.Subject)
				}
			}
		}
	}
}
