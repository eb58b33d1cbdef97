package main

import (
	"os"
	"testing"
)

// Only what nobody can have changed of the program itself is given back; and a program that has done so goes on.
func TestForgetStart(t *testing.T) {
	const exe = "/usr/bin/ztun"
	for line, want := range map[string]bool{
		"00400000-01a00000 r-xp 00000000 08:01 123                        " + exe: true,
		"01a00000-03a00000 r--p 01600000 08:01 123                        " + exe: true,
		"03a00000-03b00000 rw-p 03600000 08:01 123                        " + exe: false,
		"03a00000-03b00000 r--s 03600000 08:01 123                        " + exe: false,
		"7f00-8000 r-xp 00000000 08:01 124                        /lib" + exe:     false,
		"7ffd0000-7ffd1000 r-xp 00000000 00:00 0                          [vdso]": false,
		"c000000000-c000400000 r--p 00000000 00:00 0":                             false,
		"x-y r-xp 00000000 08:01 123 " + exe:                                      false,
		"2-1 r-xp 00000000 08:01 123 " + exe:                                      false,
		"":                                                                        false,
	} {
		if _, _, ok := ownPages(line, exe); ok != want {
			t.Errorf("%q: %v", line, ok)
		}
	}
	forgetStart()
	if _, err := os.ReadFile("/proc/self/maps"); err != nil {
		t.Error(err)
	}
}
