package gobench

import (
	"bufio"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// Result is one line of output.
type Result struct {
	Name   string             // without "Benchmark" and without the "-N" processor suffix
	N      int64              // iterations
	Values map[string]float64 // by unit, as printed: ns/op, MB/s, B/op, allocs/op, and custom ones
}

// Parse reads results until the end of r. A benchmark that ran several times (-count) yields several results, in order.
func Parse(r io.Reader) ([]Result, error) {
	var out []Result
	sc := bufio.NewScanner(r)
	sc.Buffer(make([]byte, 0, 64<<10), 1<<20)
	for sc.Scan() {
		res, ok, err := parseLine(sc.Text())
		if err != nil {
			return out, err
		}
		if ok {
			out = append(out, res)
		}
	}
	return out, sc.Err()
}

func parseLine(line string) (Result, bool, error) {
	f := strings.Fields(line)
	if len(f) < 4 || !strings.HasPrefix(f[0], "Benchmark") || len(f[0]) == len("Benchmark") {
		// "BenchmarkX-2" alone is printed before the benchmark runs when it logs: not a result.
		return Result{}, false, nil
	}
	n, err := strconv.ParseInt(f[1], 10, 64)
	if err != nil {
		// A log line that happens to open with a benchmark's name.
		return Result{}, false, nil
	}
	if len(f)%2 != 0 {
		return Result{}, false, fmt.Errorf("gobench: %q: value without a unit", line)
	}
	res := Result{Name: trimProcs(strings.TrimPrefix(f[0], "Benchmark")), N: n,
		Values: make(map[string]float64, len(f)/2-1)}
	for i := 2; i < len(f); i += 2 {
		v, err := strconv.ParseFloat(f[i], 64)
		if err != nil {
			return Result{}, false, fmt.Errorf("gobench: %q: %q is not a number", line, f[i])
		}
		res.Values[f[i+1]] = v
	}
	return res, true, nil
}

// trimProcs takes off the "-8" that the testing package adds when GOMAXPROCS is not 1.
func trimProcs(name string) string {
	if i := strings.LastIndexByte(name, '-'); i > 0 {
		if _, err := strconv.ParseUint(name[i+1:], 10, 32); err == nil {
			return name[:i]
		}
	}
	return name
}

// Throughput is the bytes moved per second: from MB/s (1e6 bytes) when the benchmark called SetBytes, else from a
// custom unit "Gb/s", else false.
func (r Result) Throughput() (bytesPerSecond float64, ok bool) {
	if v, ok := r.Values["MB/s"]; ok {
		return v * 1e6, true
	}
	if v, ok := r.Values["Gb/s"]; ok {
		return v * 1e9 / 8, true
	}
	return 0, false
}
