package zlog

import (
	"encoding"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"strconv"
	"time"
	"unicode"
	"unicode/utf8"
)

// maxValue bounds one value (or message) in a line, in bytes before escaping: peers choose some of them.
const maxValue = 8 << 10

const cutMark = "...(cut)"

func appendTime(b []byte, t time.Time) []byte {
	return t.UTC().AppendFormat(b, "2006-01-02T15:04:05.000000Z")
}

// cut bounds s without splitting a character.
func (h *handler) cut(s string) (string, bool) {
	if len(s) <= maxValue {
		return s, false
	}
	h.log.cut.Add(1)
	n := maxValue
	for n > maxValue-utf8.UTFMax && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n], true
}

// plain reports whether s can be copied into a line as it stands, in either format.
func plain(s string) bool {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c >= 0x7f || c == '"' || c == '\\' {
			return false
		}
	}
	return true
}

// appendTextAttr appends " k=v", without the space if nothing was appended since start. Groups are flattened.
func (h *handler) appendTextAttr(b []byte, start int, prefix string, a slog.Attr) []byte {
	v := a.Value.Resolve()
	if a.Key == "" && v.Kind() != slog.KindGroup {
		return b // slog: an empty Attr is ignored
	}
	if v.Kind() == slog.KindGroup {
		for _, e := range v.Group() {
			b = h.appendTextAttr(b, start, join(prefix, a.Key), e)
		}
		return b
	}
	if len(b) > start {
		b = append(b, ' ')
	}
	if prefix != "" {
		b = append(b, prefix...)
		b = append(b, '.')
	}
	b = h.appendDisplay(b, a.Key)
	b = append(b, '=')
	switch v.Kind() {
	case slog.KindString:
		return h.appendQuoted(b, v.String())
	case slog.KindInt64:
		return strconv.AppendInt(b, v.Int64(), 10)
	case slog.KindUint64:
		return strconv.AppendUint(b, v.Uint64(), 10)
	case slog.KindFloat64:
		return strconv.AppendFloat(b, v.Float64(), 'g', -1, 64)
	case slog.KindBool:
		return strconv.AppendBool(b, v.Bool())
	case slog.KindDuration:
		return append(b, v.Duration().String()...)
	case slog.KindTime:
		return appendTime(b, v.Time())
	}
	switch x := v.Any().(type) {
	case netip.AddrPort:
		return appendAddrPort(b, x)
	case netip.Addr:
		return appendAddr(b, x)
	case netip.Prefix:
		return x.AppendTo(b)
	case error:
		return h.appendQuoted(b, text(x.Error))
	default:
		return h.appendDisplay(b, displayText(x))
	}
}

// appendJSONAttr appends ,"k":v; with start >= 0 the comma is left out when nothing stands after start.
func (h *handler) appendJSONAttr(b []byte, start int, prefix string, a slog.Attr) []byte {
	v := a.Value.Resolve()
	if a.Key == "" && v.Kind() != slog.KindGroup {
		return b
	}
	if v.Kind() == slog.KindGroup {
		for _, e := range v.Group() {
			b = h.appendJSONAttr(b, start, join(prefix, a.Key), e)
		}
		return b
	}
	if len(b) > start {
		b = append(b, ',')
	}
	b = h.appendJSONString(b, join(prefix, a.Key))
	b = append(b, ':')
	switch v.Kind() {
	case slog.KindString:
		return h.appendJSONString(b, v.String())
	case slog.KindInt64:
		return strconv.AppendInt(b, v.Int64(), 10)
	case slog.KindUint64:
		return strconv.AppendUint(b, v.Uint64(), 10)
	case slog.KindFloat64:
		if j, err := json.Marshal(v.Float64()); err == nil {
			return append(b, j...)
		}
		return append(b, "null"...) // NaN and infinities, as serde_json
	case slog.KindBool:
		return strconv.AppendBool(b, v.Bool())
	case slog.KindDuration:
		return h.appendJSONString(b, v.Duration().String())
	case slog.KindTime:
		return append(appendTime(append(b, '"'), v.Time()), '"')
	}
	switch x := v.Any().(type) {
	case netip.AddrPort:
		if x.Addr().Zone() == "" {
			return append(appendAddrPort(append(b, '"'), x), '"')
		}
		return h.appendJSONString(b, x.String())
	case netip.Addr:
		if x.Zone() == "" {
			return append(appendAddr(append(b, '"'), x), '"')
		}
		return h.appendJSONString(b, x.String())
	case netip.Prefix:
		return append(x.AppendTo(append(b, '"')), '"')
	case error:
		return h.appendJSONString(b, text(x.Error))
	case nil:
		return append(b, "null"...)
	default:
		return h.appendJSONString(b, displayText(x))
	}
}

// appendAddrPort is AppendTo, with the text of String for an invalid one (AppendTo appends nothing).
func appendAddrPort(b []byte, a netip.AddrPort) []byte {
	if !a.IsValid() {
		return append(b, "invalid"...)
	}
	return a.AppendTo(b)
}

func appendAddr(b []byte, a netip.Addr) []byte {
	if !a.IsValid() {
		return append(b, "invalid"...)
	}
	return a.AppendTo(b)
}

func join(prefix, key string) string {
	switch {
	case prefix == "":
		return key
	case key == "":
		return prefix
	}
	return prefix + "." + key
}

// displayText is the text of a value that is shown unquoted.
func displayText(x any) string {
	switch x := x.(type) {
	case fmt.Stringer:
		return text(x.String)
	case encoding.TextMarshaler:
		return text(func() string {
			t, err := x.MarshalText()
			if err != nil {
				return "!ERROR:" + err.Error()
			}
			return string(t)
		})
	}
	return text(func() string { return fmt.Sprintf("%+v", x) })
}

// text calls a method of a logged value; a panic in it (a nil pointer, mostly) becomes its text, since a
// log line must not be able to end the program.
func text(f func() string) (s string) {
	defer func() {
		if p := recover(); p != nil {
			s = fmt.Sprintf("!PANIC:%v", p)
		}
	}()
	return f()
}

// appendQuoted is Rust's debug form of a string.
func (h *handler) appendQuoted(b []byte, s string) []byte {
	s, wasCut := h.cut(s)
	b = append(b, '"')
	if plain(s) {
		b = append(b, s...)
	} else {
		for _, r := range s {
			switch r {
			case '"', '\\':
				b = append(b, '\\', byte(r))
			default:
				b = appendRune(b, r)
			}
		}
	}
	if wasCut {
		b = append(b, cutMark...)
	}
	return append(b, '"')
}

// appendDisplay appends s unquoted, with whatever could break the line escaped.
func (h *handler) appendDisplay(b []byte, s string) []byte {
	s, wasCut := h.cut(s)
	if plain(s) {
		b = append(b, s...)
	} else {
		for _, r := range s {
			b = appendRune(b, r)
		}
	}
	if wasCut {
		b = append(b, cutMark...)
	}
	return b
}

// appendRune escapes what is not printable, the way Rust's char::escape_debug does. Invalid UTF-8 has
// become U+FFFD by the range over the string.
func appendRune(b []byte, r rune) []byte {
	switch {
	case r == '\n':
		return append(b, '\\', 'n')
	case r == '\r':
		return append(b, '\\', 'r')
	case r == '\t':
		return append(b, '\\', 't')
	case r == 0:
		return append(b, '\\', '0')
	case r == utf8.RuneError || unicode.IsPrint(r):
		return utf8.AppendRune(b, r)
	}
	b = append(b, `\u{`...)
	b = strconv.AppendInt(b, int64(r), 16)
	return append(b, '}')
}

const hex = "0123456789abcdef"

func (h *handler) appendJSONString(b []byte, s string) []byte {
	s, wasCut := h.cut(s)
	b = append(b, '"')
	if plain(s) {
		b = append(b, s...)
	} else {
		for _, r := range s {
			switch {
			case r == '"' || r == '\\':
				b = append(b, '\\', byte(r))
			case r == '\n':
				b = append(b, '\\', 'n')
			case r == '\r':
				b = append(b, '\\', 'r')
			case r == '\t':
				b = append(b, '\\', 't')
			case r < ' ' || r == 0x7f:
				b = append(b, `\u00`...)
				b = append(b, hex[r>>4], hex[r&15])
			default:
				b = utf8.AppendRune(b, r)
			}
		}
	}
	if wasCut {
		b = append(b, cutMark...)
	}
	return append(b, '"')
}
