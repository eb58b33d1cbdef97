package main

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ztun/test/bench/proc"
	"ztun/test/bench/report"
)

// machine describes where we run. What cannot be found out stays empty.
func machine(ctx context.Context, root string) report.Machine {
	m := report.Machine{Cores: runtime.NumCPU(), Go: runtime.Version(), Arch: runtime.GOARCH, CPU: "unknown"}
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		m.CPU = proc.ParseModel(string(b))
	}
	if b, err := os.ReadFile("/proc/meminfo"); err == nil {
		m.Memory = proc.ParseMeminfo(string(b))["MemTotal"]
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	if b, err := os.ReadFile("/proc/sys/net/ipv4/tcp_congestion_control"); err == nil {
		m.Congestion = strings.TrimSpace(string(b))
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	git := func(args ...string) string {
		out, err := exec.CommandContext(ctx, "git", append([]string{"-C", root}, args...)...).Output()
		if err != nil {
			return ""
		}
		return string(bytes.TrimSpace(out))
	}
	if m.Commit = git("rev-parse", "--short", "HEAD"); m.Commit != "" &&
		git("status", "--porcelain", "--untracked-files=no") != "" {
		m.Commit += " with changes"
	}
	return m
}

// command is how the same is run again.
func command(args []string) string {
	out := []string{"scripts/bench"}
	skip := false
	for _, a := range args {
		name, _, eq := strings.Cut(strings.TrimLeft(a, "-"), "=")
		switch {
		case skip:
			skip = false
		case strings.HasPrefix(a, "-") && name == "remove-bin":
		case strings.HasPrefix(a, "-") && (name == "bin" || name == "root"): // of scripts/bench itself
			skip = !eq
		default:
			out = append(out, quote(a))
		}
	}
	return strings.Join(out, " ")
}

// quote makes s one word of a shell where it needs to be.
func quote(s string) string {
	if s != "" && strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_=./,:%+@") == "" {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
