package report

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"math"
	"strconv"
	"strings"
	"testing"
)

// shape is an element of an SVG, as far as the tests look at it.
type shape struct {
	name, text string
	attr       map[string]string
}

// shapes reads an SVG, which must be well-formed and without numbers that are none.
func shapes(t *testing.T, svg []byte) (all []shape) {
	t.Helper()
	if bytes.Contains(svg, []byte("NaN")) || bytes.Contains(svg, []byte("Inf")) {
		t.Fatalf("numbers that are none in\n%s", svg)
	}
	d := xml.NewDecoder(bytes.NewReader(svg))
	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatalf("%v in\n%s", err, svg)
		}
		switch x := token.(type) {
		case xml.StartElement:
			s := shape{name: x.Name.Local, attr: map[string]string{}}
			for _, a := range x.Attr {
				s.attr[a.Name.Local] = a.Value
			}
			all = append(all, s)
		case xml.CharData:
			if len(all) > 0 {
				all[len(all)-1].text += string(x)
			}
		}
	}
}

func (s *shape) number(t *testing.T, name string) float64 {
	t.Helper()
	v, err := strconv.ParseFloat(s.attr[name], 64)
	if err != nil {
		t.Fatal(s, err)
	}
	return v
}

func values(vs ...float64) (out []*float64) {
	for _, v := range vs {
		if math.IsNaN(v) {
			out = append(out, nil)
		} else {
			out = append(out, &v)
		}
	}
	return out
}

// Bars are as long as the medians, in their order, with the base first; names are text whatever is in them.
func TestPlotBars(t *testing.T) {
	r := &Run{Rows: []figure{
		{Case: "a < b & c", Metric: "rate", Unit: "per s", Base: "wire", Values: map[string][]*float64{
			"me": values(90, 100, 120), "wire": values(400, math.NaN(), 400), "absent": values(math.NaN())}},
		{Case: "other", Metric: "p50", Values: map[string][]*float64{"me": values(7)}},
	}}
	var b bytes.Buffer
	if err := PlotBars(&b, r, []string{"rate"}); err != nil {
		t.Fatal(err)
	}
	var bars []shape
	var texts []string
	for _, s := range shapes(t, b.Bytes()) {
		if s.name == "rect" {
			bars = append(bars, s)
		}
		texts = append(texts, strings.TrimSpace(s.text))
	}
	if len(bars) != 2 {
		t.Fatalf("%d bars in\n%s", len(bars), b.String())
	}
	if wire, me := bars[0].number(t, "width"), bars[1].number(t, "width"); math.Abs(wire/me-4) > 0.01 {
		t.Errorf("bars of %v and %v for 400 and 100", wire, me)
	}
	all := strings.Join(texts, "\n")
	for _, want := range []string{"rate, per s", "a < b & c", "100 (90.0-120)", "400"} {
		if !strings.Contains(all, want) {
			t.Errorf("no %q in\n%s", want, all)
		}
	}
	if strings.Contains(all, "absent") || strings.Contains(all, "other") {
		t.Error("more than was asked for:", all)
	}
	if err := PlotBars(io.Discard, r, []string{"none"}); err == nil || !strings.Contains(err.Error(), "none") {
		t.Error(err)
	}
}

// Sizes stand in order and by their powers of ten, higher values higher; a base beside which something was measured
// is left out.
func TestPlotGrowth(t *testing.T) {
	var runs []Grown
	for _, n := range []float64{10000, 100, 1000} {
		runs = append(runs, Grown{n, &Run{Rows: []figure{{Case: "c", Metric: "memory", Unit: "MiB", Base: "wire",
			Values: map[string][]*float64{"me": values(n / 10), "wire": values(1)}}}}})
	}
	var b bytes.Buffer
	if err := PlotGrowth(&b, runs, []string{"memory"}, "connections"); err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, s := range shapes(t, b.Bytes()) {
		if s.name == "polyline" {
			lines = append(lines, s.attr["points"])
		}
	}
	if len(lines) != 1 {
		t.Fatalf("%d lines in\n%s", len(lines), b.String())
	}
	var xs, ys []float64
	for _, p := range strings.Fields(lines[0]) {
		x, y, _ := strings.Cut(p, ",")
		vx, errX := strconv.ParseFloat(x, 64)
		vy, errY := strconv.ParseFloat(y, 64)
		if errX != nil || errY != nil {
			t.Fatal(p)
		}
		xs, ys = append(xs, vx), append(ys, vy)
	}
	if len(xs) != 3 || math.Abs((xs[1]-xs[0])-(xs[2]-xs[1])) > 0.2 || xs[0] >= xs[1] {
		t.Error("sizes at", xs)
	}
	if math.Abs((ys[0]-ys[1])-(ys[1]-ys[2])) > 0.2 || ys[0] <= ys[1] {
		t.Error("values at", ys)
	}
	if !strings.Contains(b.String(), "memory, MiB over connections") {
		t.Error("no title")
	}
	for name, bad := range map[string][]Grown{"no run": nil, "no such figure": {{1, new(Run)}}, "no size": {{0, runs[0].Run}}} {
		if err := PlotGrowth(io.Discard, bad, []string{"memory"}, "x"); err == nil {
			t.Error("drawn:", name)
		}
	}
	one := runs[:1] // one size is a point, not a division by zero
	b.Reset()
	if err := PlotGrowth(&b, one, []string{"memory"}, "x"); err != nil {
		t.Error(err)
	}
	shapes(t, b.Bytes())
}
