package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"
	"golang.org/x/sys/unix"

	"ztun/admin/words"
)

// output is what -o says, in every command that shows something.
type output struct{ format string }

const (
	outputTable = "table"
	outputWide  = "wide"
	outputJSON  = "json"
	outputYAML  = "yaml"
)

func (o *output) bind(cmd *cobra.Command) {
	cmd.Flags().VarP(o, "output", "o", "table, wide, json or yaml")
	o.format = outputTable
}

// String, Set and Type implement pflag.Value.
func (o *output) String() string { return o.format }
func (o *output) Type() string   { return "format" }
func (o *output) Set(v string) error {
	switch v {
	case outputTable, outputWide, outputJSON, outputYAML:
		o.format = v
		return nil
	}
	return fmt.Errorf("choose table, wide, json or yaml")
}

// structured reports whether machines are to read it.
func (o *output) structured() bool { return o.format == outputJSON || o.format == outputYAML }

// write shows v as JSON or YAML, with the same names in the same order.
func (o *output) write(w io.Writer, v any) error {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(v); err != nil {
		return err
	}
	if o.format == outputJSON {
		_, err := w.Write(b.Bytes())
		return err
	}
	var doc yaml.Node // JSON is YAML, and a node keeps the order
	if err := yaml.Unmarshal(b.Bytes(), &doc); err != nil {
		return err
	}
	block(&doc)
	y := yaml.NewEncoder(w)
	y.SetIndent(2)
	if err := y.Encode(&doc); err != nil {
		return err
	}
	return y.Close()
}

// block takes JSON's look from a YAML document: braces, and quotes where they are not needed.
func block(n *yaml.Node) {
	n.Style &^= yaml.FlowStyle | yaml.DoubleQuotedStyle
	for _, c := range n.Content {
		block(c)
	}
}

// column is one of a table of Ts. A wide one is shown with -o wide only.
type column[T any] struct {
	head string
	wide bool
	cell func(T) string
}

// rowWriter writes rows in columns; a row that comes later is aligned with those before.
type rowWriter[T any] struct {
	w       io.Writer
	columns []column[T]
	widths  []int
	headed  bool
}

func newTable[T any](w io.Writer, o *output, columns []column[T]) *rowWriter[T] {
	t := &rowWriter[T]{w: w}
	for _, c := range columns {
		if !c.wide || o.format == outputWide {
			t.columns = append(t.columns, c)
			t.widths = append(t.widths, len(c.head))
		}
	}
	return t
}

// write shows rows, below the heads if they are the first.
func (t *rowWriter[T]) write(rows []T) error {
	var lines [][]string
	if !t.headed {
		t.headed = true
		heads := make([]string, len(t.columns))
		for i, c := range t.columns {
			heads[i] = c.head
		}
		lines = append(lines, heads)
	}
	for _, r := range rows {
		cells := make([]string, len(t.columns))
		for i, c := range t.columns {
			cells[i] = cellOf(c.cell(r))
			t.widths[i] = max(t.widths[i], utf8.RuneCountInString(cells[i]))
		}
		lines = append(lines, cells)
	}
	var b strings.Builder
	for _, cells := range lines {
		for i, c := range cells {
			b.WriteString(c)
			if i < len(cells)-1 {
				b.WriteString(strings.Repeat(" ", t.widths[i]-utf8.RuneCountInString(c)+2))
			}
		}
		b.WriteByte('\n')
	}
	_, err := io.WriteString(t.w, b.String())
	return err
}

// cellOf is the text of a cell: some of what is shown was chosen by a peer.
func cellOf(s string) string { return cmp.Or(words.Printable(s), "-") }

// watching is how something is followed: what there is, asked for every second.
type watching[T any] struct {
	out     io.Writer
	o       *output
	columns []column[T]
	// fetch asks; key tells one thing from another, and text is what of it is worth another row when it has changed.
	// gone, if there is one, is how something is shown that is there no longer.
	fetch func(context.Context) ([]T, error)
	key   func(T) string
	text  func(T) string
	gone  func(T) T
	every time.Duration
}

// run shows it once or, to follow, until ctx ends: on a terminal as a table that is drawn anew, elsewhere as a row,
// or a line of JSON, or a document of YAML, for what is new or has changed.
func (w watching[T]) run(ctx context.Context, follow bool, all func([]T) any) error {
	items, err := w.fetch(ctx)
	if err != nil {
		return err
	}
	if !follow {
		if w.o.structured() {
			return w.o.write(w.out, all(items))
		}
		return newTable(w.out, w.o, w.columns).write(items)
	}
	tick := time.NewTicker(w.every)
	defer tick.Stop()
	t := newTable(w.out, w.o, w.columns)
	known := map[string]seen[T]{}
	for {
		if err := w.step(t, known, items); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if items, err = w.fetch(ctx); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
	}
}

// seen is what was shown of something.
type seen[T any] struct {
	text string
	item T
}

func (w watching[T]) step(t *rowWriter[T], known map[string]seen[T], items []T) error {
	if rows := terminalRows(w.out); rows > 0 && !w.o.structured() {
		t = newTable(w.out, w.o, w.columns)
		if _, err := io.WriteString(w.out, "\x1b[H\x1b[2J"); err != nil {
			return err
		}
		return t.write(items[:min(len(items), max(rows-2, 1))])
	}
	var news []T
	still := make(map[string]bool, len(items))
	for _, item := range items {
		key, text := w.key(item), w.text(item)
		still[key] = true
		if old, ok := known[key]; !ok || old.text != text {
			known[key] = seen[T]{text, item}
			news = append(news, item)
		}
	}
	for key, old := range known {
		if !still[key] {
			delete(known, key)
			if w.gone != nil {
				news = append(news, w.gone(old.item))
			}
		}
	}
	return w.show(t, news)
}

func (w watching[T]) show(t *rowWriter[T], news []T) error {
	if !w.o.structured() {
		if len(news) == 0 && t.headed {
			return nil
		}
		return t.write(news)
	}
	for _, n := range news {
		if w.o.format == outputYAML {
			if _, err := io.WriteString(w.out, "---\n"); err != nil {
				return err
			}
			if err := w.o.write(w.out, n); err != nil {
				return err
			}
		} else if err := json.NewEncoder(w.out).Encode(n); err != nil {
			return err
		}
	}
	return nil
}

// terminalRows is the height of the terminal that w is, 0 if it is none.
func terminalRows(w io.Writer) int {
	f, ok := w.(*os.File)
	if !ok {
		return 0
	}
	size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return 0
	}
	return max(int(size.Row), 3)
}

// bytesText is a number of bytes in three digits or so.
func bytesText(n uint64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return fmt.Sprint(n)
	}
	v, i := float64(n)/1024, 0
	for v >= 1024 && i < len(units)-1 {
		v, i = v/1024, i+1
	}
	if v >= 100 {
		return fmt.Sprintf("%.0f%ci", v, units[i])
	}
	return fmt.Sprintf("%.1f%ci", v, units[i])
}
