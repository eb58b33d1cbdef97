package load

import (
	"errors"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// SetNiceness gives this process the niceness n (setpriority(2), -20 to 19): each of its threads, as Linux keeps it by
// thread, and so those that they start. Less than before takes CAP_SYS_NICE.
func SetNiceness(n int) error {
	for {
		changed := false
		threads, err := os.ReadDir("/proc/self/task")
		if err != nil {
			return err
		}
		for _, t := range threads {
			id, err := strconv.Atoi(t.Name())
			if err != nil {
				return err
			}
			// The system call's result is 20 less the niceness, as it could not be negative.
			now, err := unix.Getpriority(unix.PRIO_PROCESS, id)
			if err == nil && now != 20-n {
				changed = true
				err = unix.Setpriority(unix.PRIO_PROCESS, id, n)
			}
			if err != nil && !errors.Is(err, unix.ESRCH) { // it has ended
				return os.NewSyscallError("setpriority", err)
			}
		}
		if !changed {
			return nil // nor has a thread that was not asked yet started another
		}
	}
}
