package state

import (
	"runtime"
	"testing"
)

// One changed entry of a big table costs little memory: every update leaves that as garbage.
func TestTableChangeIsSmall(t *testing.T) {
	e := newEditor[string, int](sumString)
	keys := make([]string, 100_000)
	for i := range keys {
		keys[i] = "kubernetes//Pod/ns/pod-" + string(rune('a'+i%26)) + string(rune(0x4e00+i/26))
		e.set(keys[i], i)
	}
	old := e.freeze()
	if old.n != len(keys) {
		t.Fatal(old.n, "entries")
	}
	const changes = 1000
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for i := range changes {
		e.set(keys[i*97], -1)
		e.freeze()
	}
	runtime.ReadMemStats(&after)
	if each := (after.TotalAlloc - before.TotalAlloc) / changes; each > 8<<10 {
		t.Errorf("%d bytes for each change", each)
	}
	now := e.freeze()
	for i := range changes {
		was, _ := old.get(keys[i*97])
		is, _ := now.get(keys[i*97])
		if was != i*97 || is != -1 {
			t.Fatalf("entry %d was %d, is %d", i*97, was, is)
		}
	}
}
