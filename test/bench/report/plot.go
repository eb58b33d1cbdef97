package report

import (
	"encoding/xml"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"

	"ztun/test/bench/stat"
)

// A plot is an SVG of one figure. Its colours are chosen for light and dark pages alike, and every value stands
// beside what shows it, so that nobody has to measure.

const (
	plotWidth = 760
	plotLabel = 250 // room for a bar's name
	plotRow   = 22
	plotTop   = 56
	plotHigh  = 260 // of a growth's area
)

// plotStyle: colours of text and lines for light pages, and for dark ones.
const plotStyle = `<style>
text { font: 12px sans-serif; fill: #24292f } .dim { fill: #57606a } .title { font-size: 15px; font-weight: bold }
.axis { stroke: #8c959f } .range { stroke: #24292f; stroke-width: 1.5 } polyline { fill: none; stroke-width: 2 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .dim { fill: #9198a1 } .range { stroke: #e6edf3 } }
</style>
`

// plotColours tell subjects apart, also for those who do not see red and green as others do (Okabe and Ito).
var plotColours = [...]string{"#0072b2", "#e69f00", "#009e73", "#cc79a7"}

// canvas collects an SVG.
type canvas struct {
	strings.Builder
	height int
}

func (c *canvas) text(x, y float64, class, anchor, s string) {
	fmt.Fprintf(c, `<text x="%.1f" y="%.1f" class="%s" text-anchor="%s">`, x, y, class, anchor)
	_ = xml.EscapeText(c, []byte(s)) // to memory
	c.WriteString("</text>\n")
}

func (c *canvas) line(x1, y1, x2, y2 float64, class string) {
	fmt.Fprintf(c, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" class="%s"/>`+"\n", x1, y1, x2, y2, class)
}

func (c *canvas) writeTo(out io.Writer) error {
	_, err := fmt.Fprintf(out, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d">`+
		"\n%s%s</svg>\n", plotWidth, c.height, plotWidth, c.height, plotStyle, c.String())
	return err
}

// head is the title, and where the figures come from.
func (c *canvas) head(title string, r *Run) {
	c.text(8, 20, "title", "start", title)
	c.text(8, 38, "dim", "start", fmt.Sprintf("%s, %d cores, kernel %s, %s%s; %s", r.Machine.CPU, r.Machine.Cores,
		r.Machine.Kernel, r.Machine.Go, suffix(", commit ", r.Machine.Commit), r.Started.UTC().Format("2006-01-02")))
}

// summary of a subject's repetitions.
func (f *figure) summary(subject string) stat.Summary {
	vs := make([]float64, 0, len(f.Values[subject]))
	for _, v := range f.Values[subject] {
		if v != nil {
			vs = append(vs, *v)
		}
	}
	return stat.Summarize(vs)
}

// subjects of a figure, the base first.
func (f *figure) subjects() (names []string) {
	for s := range f.Values {
		if f.summary(s).Valid() {
			names = append(names, s)
		}
	}
	slices.SortFunc(names, func(a, b string) int {
		if (a == f.Base) != (b == f.Base) {
			return map[bool]int{true: -1, false: 1}[a == f.Base]
		}
		return strings.Compare(a, b)
	})
	return names
}

// figuresOf lists a run's figures of some metrics.
func (r *Run) figuresOf(metrics []string) (fs []*figure) {
	for i := range r.Rows {
		if f := &r.Rows[i]; slices.Contains(metrics, f.Metric) && len(f.subjects()) > 0 {
			fs = append(fs, f)
		}
	}
	return fs
}

// PlotBars draws metrics of one run: a bar for each case and subject, as long as the median, with the range of the
// repetitions.
func PlotBars(out io.Writer, r *Run, metrics []string) error {
	fs := r.figuresOf(metrics)
	most, rows, colour := 0.0, 0, map[string]string{}
	for _, f := range fs {
		for _, s := range f.subjects() {
			most = max(most, f.summary(s).Max)
			if rows++; colour[s] == "" {
				colour[s] = plotColours[len(colour)%len(plotColours)]
			}
		}
	}
	if most <= 0 {
		return fmt.Errorf("nothing to draw: the run has no figure %s", strings.Join(metrics, " or "))
	}
	c := &canvas{height: plotTop + rows*plotRow + len(fs)*plotRow + 8}
	c.head(strings.Join(metrics, ", ")+suffix(", ", fs[0].Unit), r)
	x := func(v float64) float64 { return plotLabel + v/most*(plotWidth-plotLabel-110) }
	y := float64(plotTop)
	for _, f := range fs {
		name := f.Case
		if len(metrics) > 1 {
			name += ": " + f.Metric
		}
		c.text(8, y+15, "", "start", name)
		y += plotRow
		for _, s := range f.subjects() {
			sum := f.summary(s)
			c.text(plotLabel-8, y+12, "dim", "end", s)
			fmt.Fprintf(c, `<rect x="%.1f" y="%.1f" width="%.1f" height="14" fill="%s"/>`+"\n", x(0), y, x(sum.Median)-x(0),
				colour[s])
			if sum.N > 1 {
				c.line(x(sum.Min), y+7, x(sum.Max), y+7, "range")
			}
			c.text(x(sum.Max)+6, y+12, "", "start", cell(sum, false))
			y += plotRow
		}
	}
	return c.writeTo(out)
}

// Grown is a run at a size: so many connections, or workloads.
type Grown struct {
	At  float64
	Run *Run
}

// PlotGrowth draws how metrics grow over runs of several sizes, from the smallest on: a line for each case and
// subject, both axes by powers of ten. size says what grows.
func PlotGrowth(out io.Writer, runs []Grown, metrics []string, size string) error {
	slices.SortFunc(runs, func(a, b Grown) int { return int(math.Copysign(1, a.At-b.At)) })
	type point struct{ at, v float64 }
	var names []string
	lines, unit := map[string][]point{}, ""
	low, high := math.Inf(1), 0.0
	for _, g := range runs {
		for _, f := range g.Run.figuresOf(metrics) {
			for _, s := range f.subjects() {
				v := f.summary(s).Median
				if s == f.Base && len(f.Values) > 1 || v <= 0 { // zero has no place on such an axis
					continue
				}
				name := f.Metric + ", " + s
				if lines[name] == nil {
					names = append(names, name)
				}
				lines[name] = append(lines[name], point{g.At, v})
				low, high, unit = min(low, v), max(high, v), f.Unit
			}
		}
	}
	if len(names) == 0 || runs[0].At <= 0 {
		return fmt.Errorf("nothing to draw: no run has a figure %s at a size above zero", strings.Join(metrics, " or "))
	}
	first, last := math.Floor(math.Log10(low)), math.Ceil(math.Log10(high*1.001))
	from, to := math.Log10(runs[0].At), math.Log10(runs[len(runs)-1].At)
	const left, right = 70.0, 90.0
	x := func(v float64) float64 { return left + (math.Log10(v)-from)/max(to-from, 1e-9)*(plotWidth-left-right) }
	y := func(v float64) float64 { return plotTop + (last-math.Log10(v))/(last-first)*plotHigh }
	c := &canvas{height: plotTop + plotHigh + 40 + len(names)*18}
	c.head(strings.Join(metrics, ", ")+suffix(", ", unit)+" over "+size, runs[0].Run)
	for p := first; p <= last; p++ {
		v := math.Pow(10, p)
		c.line(left, y(v), plotWidth-right, y(v), "axis")
		c.text(left-6, y(v)+4, "dim", "end", strconv.FormatFloat(v, 'f', -1, 64))
	}
	for _, g := range runs {
		c.text(x(g.At), plotTop+plotHigh+18, "dim", "middle", strconv.FormatFloat(g.At, 'f', -1, 64))
	}
	for i, name := range names {
		colour := plotColours[i%len(plotColours)]
		var at []string
		for _, p := range lines[name] {
			at = append(at, fmt.Sprintf("%.1f,%.1f", x(p.at), y(p.v)))
			c.text(x(p.at)+4, y(p.v)-5, "", "start", Number(p.v))
		}
		fmt.Fprintf(c, `<polyline points="%s" stroke="%s"/>`+"\n", strings.Join(at, " "), colour)
		base := float64(plotTop + plotHigh + 36 + i*18)
		fmt.Fprintf(c, `<rect x="%.1f" y="%.1f" width="14" height="4" fill="%s"/>`+"\n", left, base-5, colour)
		c.text(left+22, base, "", "start", name)
	}
	return c.writeTo(out)
}
