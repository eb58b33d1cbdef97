package load

import (
	"os"
	"runtime"
	"strconv"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// TestSetNiceness: every thread has it, those that start meanwhile as well.
func TestSetNiceness(t *testing.T) {
	was, err := unix.Getpriority(unix.PRIO_PROCESS, 0)
	if err != nil {
		t.Fatal(err)
	}
	n := 20 - was
	if n >= 19 {
		t.Skip("this process has the highest niceness already")
	}
	var threads sync.WaitGroup
	end := make(chan struct{})
	for range 8 {
		threads.Go(func() {
			runtime.LockOSThread()
			<-end
		})
	}
	defer threads.Wait()
	defer close(end)
	for _, want := range []int{n + 1, n} {
		if err := SetNiceness(want); err != nil {
			if os.Geteuid() != 0 {
				t.Skip("without root: ", err)
			}
			t.Fatal(err)
		}
		ids, err := os.ReadDir("/proc/self/task")
		if err != nil {
			t.Fatal(err)
		}
		for _, id := range ids {
			i, _ := strconv.Atoi(id.Name())
			if got, err := unix.Getpriority(unix.PRIO_PROCESS, i); err == nil && 20-got != want {
				t.Errorf("thread %d has niceness %d, want %d", i, 20-got, want)
			}
		}
	}
}
