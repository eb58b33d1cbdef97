package xds

import (
	"io"
	"net/netip"
	"strconv"
	"unicode/utf8"
)

// jsonWriter writes indented JSON as serde_json's pretty printer does, and allocates nothing per entry:
// garbage that a dump makes would have to be collected at the expense of the connections. Text gathers in
// one buffer that goes to w in pieces of about dumpPiece bytes. Keys come in the caller's order, which has
// to be alphabetical. The first error sticks and ends everything.
type jsonWriter struct {
	w     io.Writer
	b     []byte
	depth int  // levels of two spaces
	first bool // nothing is written yet in the innermost array or object
	err   error
}

// dumpPiece is well below the chunk of admin's dumper, which passes the processor on after each chunk.
const dumpPiece = 8 << 10

// newJSONWriter begins depth levels deep.
func newJSONWriter(w io.Writer, depth int) *jsonWriter {
	return &jsonWriter{w: w, b: make([]byte, 0, 2*dumpPiece), depth: depth}
}

// pass hands on what has gathered if it is worth a call.
func (j *jsonWriter) pass() bool {
	if len(j.b) >= dumpPiece {
		j.flush()
	}
	return j.err == nil
}

func (j *jsonWriter) flush() error {
	if j.err == nil && len(j.b) > 0 {
		_, j.err = j.w.Write(j.b)
	}
	j.b = j.b[:0]
	return j.err
}

func (j *jsonWriter) open(c byte) {
	j.b = append(j.b, c)
	j.depth++
	j.first = true
}

func (j *jsonWriter) close(c byte) {
	j.depth--
	if !j.first {
		j.line()
	}
	j.b = append(j.b, c)
	j.first = false
}

func (j *jsonWriter) line() {
	j.b = append(j.b, '\n')
	for range j.depth {
		j.b = append(j.b, ' ', ' ')
	}
}

// next begins an entry of the open array.
func (j *jsonWriter) next() {
	if !j.first {
		j.b = append(j.b, ',')
	}
	j.first = false
	j.line()
}

// key begins a member whose key is a constant of ours.
func (j *jsonWriter) key(k string) {
	j.next()
	j.b = append(j.b, '"')
	j.b = append(j.b, k...)
	j.b = append(j.b, '"', ':', ' ')
}

// name begins a member whose key is any text.
func (j *jsonWriter) name(parts ...string) {
	j.next()
	j.text(parts...)
	j.b = append(j.b, ':', ' ')
}

// text writes one string made of parts, such as "namespace/name".
func (j *jsonWriter) text(parts ...string) {
	j.b = append(j.b, '"')
	for _, p := range parts {
		j.b = appendEscaped(j.b, p)
	}
	j.b = append(j.b, '"')
}

func (j *jsonWriter) member(k, v string) {
	j.key(k)
	j.text(v)
}

// optional leaves the empty text out.
func (j *jsonWriter) optional(k, v string) {
	if v != "" {
		j.member(k, v)
	}
}

func (j *jsonWriter) number(n uint64) { j.b = strconv.AppendUint(j.b, n, 10) }

func (j *jsonWriter) bool(v bool) { j.b = strconv.AppendBool(j.b, v) }

func (j *jsonWriter) addr(a netip.Addr) {
	j.b = append(j.b, '"')
	j.b = a.AppendTo(j.b)
	j.b = append(j.b, '"')
}

// networkAddr is "network/ip".
func (j *jsonWriter) networkAddr(network string, a netip.Addr) {
	j.b = append(j.b, '"')
	j.b = appendEscaped(j.b, network)
	j.b = append(j.b, '/')
	j.b = a.AppendTo(j.b)
	j.b = append(j.b, '"')
}

func (j *jsonWriter) prefix(p netip.Prefix) {
	j.b = append(j.b, '"')
	j.b = p.AppendTo(j.b)
	j.b = append(j.b, '"')
}

// strings writes an array of strings.
func (j *jsonWriter) strings(l []string) {
	j.open('[')
	for _, s := range l {
		j.next()
		j.text(s)
	}
	j.close(']')
}

const hexDigits = "0123456789abcdef"

// appendEscaped escapes what serde_json escapes (RFC 8259 section 7), and what YAML folds or refuses within quotes: a
// dump is read back as YAML. Bytes that are no UTF-8 become U+FFFD.
func appendEscaped(b []byte, s string) []byte {
	from := 0
	for i := 0; i < len(s); {
		c := s[i]
		if c >= ' ' && c != '"' && c != '\\' && c < 0x7f {
			i++
			continue
		}
		if c >= utf8.RuneSelf {
			r, n := utf8.DecodeRuneInString(s[i:])
			if r == utf8.RuneError && n == 1 {
				b = append(append(b, s[from:i]...), "\uFFFD"...)
				from = i + 1
			} else if foreignToYAML(r) {
				b = append(b, s[from:i]...)
				b = append(b, '\\', 'u', hexDigits[r>>12], hexDigits[r>>8&15], hexDigits[r>>4&15], hexDigits[r&15])
				from = i + n
			}
			i += n
			continue
		}
		b = append(b, s[from:i]...)
		switch c {
		case '"', '\\':
			b = append(b, '\\', c)
		case '\n':
			b = append(b, '\\', 'n')
		case '\r':
			b = append(b, '\\', 'r')
		case '\t':
			b = append(b, '\\', 't')
		case '\b':
			b = append(b, '\\', 'b')
		case '\f':
			b = append(b, '\\', 'f')
		default:
			b = append(b, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
		}
		i++
		from = i
	}
	return append(b, s[from:]...)
}

// foreignToYAML reports whether a rune beyond ASCII stands for something else, or is not allowed, within the quotes of
// YAML 1.1: controls, line breaks of other scripts, byte order marks.
func foreignToYAML(r rune) bool {
	return r < 0xa0 || r == '\u2028' || r == '\u2029' || r == '\ufeff' || r == 0xfffe || r == 0xffff
}
