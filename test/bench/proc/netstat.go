package proc

import (
	"fmt"
	"strconv"
	"strings"
)

// ParseNetstat reads /proc/net/snmp or /proc/net/netstat: pairs of lines that open with the same word, names first,
// then values. Keys are "Tcp.RetransSegs". Negative values (Tcp.MaxConn) are left out.
func ParseNetstat(s string) (map[string]uint64, error) {
	out := make(map[string]uint64)
	var names []string
	for line := range strings.Lines(s) {
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		if names == nil {
			names = f
			continue
		}
		if f[0] != names[0] || len(f) != len(names) {
			return nil, fmt.Errorf("proc: netstat: line %.40q does not fit the one before it", line)
		}
		for i := 1; i < len(f); i++ {
			if v, err := strconv.ParseUint(f[i], 10, 64); err == nil {
				out[strings.TrimSuffix(f[0], ":")+"."+names[i]] = v
			}
		}
		names = nil
	}
	return out, nil
}

// ParseDevDrops adds up the packets that the devices of /proc/net/dev have dropped, by device: received and sent.
func ParseDevDrops(s string) map[string]uint64 {
	out := make(map[string]uint64)
	for line := range strings.Lines(s) {
		name, rest, ok := strings.Cut(line, ":")
		f := strings.Fields(rest)
		if !ok || len(f) < 16 {
			continue // the head
		}
		rx, err1 := strconv.ParseUint(f[3], 10, 64)
		tx, err2 := strconv.ParseUint(f[11], 10, 64)
		if err1 == nil && err2 == nil {
			out[strings.TrimSpace(name)] = rx + tx
		}
	}
	return out
}
