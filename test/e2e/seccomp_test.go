package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// filtered, as the first argument of the test's own program, has it execute the others without user namespaces.
const filtered = "execute-without-user-namespaces"

// execFiltered executes a command under a seccomp filter that does to new user namespaces what Docker's default profile
// does: clone and unshare with CLONE_NEWUSER are EPERM, and clone3, into which a filter cannot see, is ENOSYS.
func execFiltered(args []string) error {
	const (
		number, flags = 0, 16 // offsets in struct seccomp_data: nr, the low half of args[0]
		refuse        = unix.SECCOMP_RET_ERRNO
	)
	load := func(offset uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset}
	}
	jump := func(how uint16, k uint32, yes, no uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | how | unix.BPF_K, K: k, Jt: yes, Jf: no}
	}
	end := func(k uint32) unix.SockFilter { return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: k} }
	filter := []unix.SockFilter{
		load(number),
		jump(unix.BPF_JEQ, unix.SYS_CLONE3, 5, 0),
		jump(unix.BPF_JEQ, unix.SYS_CLONE, 1, 0),
		jump(unix.BPF_JEQ, unix.SYS_UNSHARE, 0, 2),
		load(flags),
		jump(unix.BPF_JSET, unix.CLONE_NEWUSER, 2, 0),
		end(unix.SECCOMP_RET_ALLOW),
		end(refuse | uint32(unix.ENOSYS)),
		end(refuse | uint32(unix.EPERM)),
	}
	path, err := exec.LookPath(args[0])
	if err != nil {
		return err
	}
	runtime.LockOSThread() // the filter is of this thread, which execs
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0,
		uintptr(unsafe.Pointer(&program))); errno != 0 {
		return fmt.Errorf("seccomp: %w", errno)
	}
	return unix.Exec(path, args, os.Environ())
}
