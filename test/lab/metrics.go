package lab

import (
	"fmt"
	"strconv"
	"strings"
)

// Label is one label of a series, in the order of the exposition.
type Label struct{ Name, Value string }

// Series is one sample line.
type Series struct {
	Name   string
	Labels []Label
	Value  float64
}

// Metrics is a parsed text exposition, in its order.
type Metrics struct {
	Series []Series
	Types  map[string]string
	Text   string
}

// Get returns the value of a label, "" if it is absent.
func (s Series) Get(label string) string {
	for _, l := range s.Labels {
		if l.Name == label {
			return l.Value
		}
	}
	return ""
}

// String is the series without its value.
func (s Series) String() string {
	var b strings.Builder
	b.WriteString(s.Name)
	if len(s.Labels) > 0 {
		b.WriteByte('{')
		for i, l := range s.Labels {
			if i > 0 {
				b.WriteByte(',')
			}
			fmt.Fprintf(&b, "%s=%q", l.Name, l.Value)
		}
		b.WriteByte('}')
	}
	return b.String()
}

// ParseMetrics parses the Prometheus or OpenMetrics text format, strictly enough to notice a broken one.
func ParseMetrics(text string) (*Metrics, error) {
	m := &Metrics{Types: map[string]string{}, Text: text}
	for i, line := range strings.Split(text, "\n") {
		if line == "" {
			continue
		}
		if strings.HasPrefix(line, "#") {
			if f := strings.Fields(line); len(f) == 4 && f[1] == "TYPE" {
				m.Types[f[2]] = f[3]
			}
			continue
		}
		s, err := parseSeries(line)
		if err != nil {
			return nil, fmt.Errorf("metrics line %d: %w: %s", i+1, err, line)
		}
		m.Series = append(m.Series, s)
	}
	return m, nil
}

func parseSeries(line string) (Series, error) {
	var s Series
	i := strings.IndexAny(line, "{ ")
	if i <= 0 {
		return s, fmt.Errorf("no name or value")
	}
	s.Name, line = line[:i], line[i:]
	if line[0] == '{' {
		line = line[1:]
		for !strings.HasPrefix(line, "}") {
			eq := strings.IndexByte(line, '=')
			if eq <= 0 || eq+1 >= len(line) || line[eq+1] != '"' {
				return s, fmt.Errorf("bad label")
			}
			name := line[:eq]
			rest := line[eq+1:]
			end := 1
			for end < len(rest) && rest[end] != '"' {
				if rest[end] == '\\' {
					end++
				}
				end++
			}
			if end >= len(rest) {
				return s, fmt.Errorf("label value without end")
			}
			v := strings.NewReplacer(`\\`, `\`, `\"`, `"`, `\n`, "\n").Replace(rest[1:end])
			s.Labels = append(s.Labels, Label{name, v})
			line = strings.TrimPrefix(rest[end+1:], ",")
		}
		line = line[1:]
	}
	f := strings.Fields(line)
	if len(f) == 0 {
		return s, fmt.Errorf("no value")
	}
	v, err := strconv.ParseFloat(f[0], 64)
	s.Value = v
	return s, err
}

// Sum adds up the samples of a name whose labels hold all the given name=value pairs.
func (m *Metrics) Sum(name string, labels ...string) float64 {
	var sum float64
	for _, s := range m.Find(name, labels...) {
		sum += s.Value
	}
	return sum
}

// Has tells whether there is any sample of the name.
func (m *Metrics) Has(name string) bool { return len(m.Find(name)) > 0 }

// Find returns the samples of a name whose labels hold all the given name=value pairs.
func (m *Metrics) Find(name string, labels ...string) []Series {
	var out []Series
next:
	for _, s := range m.Series {
		if s.Name != name {
			continue
		}
		for _, l := range labels {
			k, v, _ := strings.Cut(l, "=")
			if s.Get(k) != v {
				continue next
			}
		}
		out = append(out, s)
	}
	return out
}
