package main

import (
	"os"
	"path/filepath"
	"testing"
)

func TestCgroupMemory(t *testing.T) {
	for name, c := range map[string]struct {
		files   map[string]string
		limit   int64
		shared  int64 // of the budget
		setting int64
	}{
		"nothing is known": {nil, 0, 1 << 28, 0},
		"version 2": {map[string]string{
			"proc/self/cgroup": "0::/kubepods/pod1/ztun\n", "sys/fs/cgroup/kubepods/pod1/ztun/memory.max": "536870912\n",
			"sys/fs/cgroup/kubepods/memory.max": "max\n",
		}, 512 << 20, 256 << 20, 0},
		"a limit above": {map[string]string{
			"proc/self/cgroup": "0::/kubepods/pod1/ztun\n", "sys/fs/cgroup/kubepods/pod1/ztun/memory.max": "max\n",
			"sys/fs/cgroup/kubepods/pod1/memory.max": "1073741824\n",
		}, 1 << 30, 512 << 20, 0},
		"a namespace of its own": {map[string]string{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "268435456\n"},
			256 << 20, 128 << 20, 0},
		"version 1": {map[string]string{
			"proc/self/cgroup": "7:cpu,cpuacct:/a\n6:memory:/a/b\n",
			"sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": "134217728\n",
			"sys/fs/cgroup/memory/memory.limit_in_bytes":     "9223372036854771712\n",
		}, 128 << 20, 64 << 20, 0},
		"no limit": {map[string]string{
			"proc/self/cgroup": "0::/x\n", "sys/fs/cgroup/x/memory.max": "max\n", "proc/meminfo": "MemTotal:  4194304 kB\n",
		}, 0, 1 << 30, 0},
		"set": {map[string]string{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "268435456\n"}, 64 << 20,
			32 << 20, 64 << 20},
	} {
		root := t.TempDir()
		for path, text := range c.files {
			path = filepath.Join(root, path)
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		m := newMemory(root, c.setting, 0)
		if m.limit != c.limit || m.all.Limit() != c.shared || m.forPod().Limit() != c.shared/2 {
			t.Errorf("%s: limit %d, %d shared, %d of a pod; want %d, %d and half of that", name, m.limit, m.all.Limit(),
				m.forPod().Limit(), c.limit, c.shared)
		}
	}
}

func TestSizes(t *testing.T) {
	for text, want := range map[string]int64{"64Mi": 64 << 20, "1.5GiB": 3 << 29, "67108864": 64 << 20, "100M": 1e8, "": 0,
		"1": 0, "-1Gi": 0, "1e300": 0, "NaN": 0, "64 Mi": 0} {
		var got int64
		if err := size(&got, 16<<20)(text); got != want || (err != nil) != (want == 0) {
			t.Errorf("%q: %d, %v", text, got, err)
		}
	}
}
