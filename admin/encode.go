package admin

import (
	"bytes"
	"encoding/json"
	"io"
)

// Encoder writes one JSON value as serde_json's pretty printer does: two spaces per level, `{}` and `[]`
// for what is empty, no HTML escapes. It streams: nothing is held beyond one Value. Errors stick and are
// returned by Err and by every later call, so that sections may check once per element.
//
// The keys of an object must come in alphabetical order: Key does not sort, Value does.
type Encoder struct {
	w     io.Writer
	err   error
	depth int
	first []bool // per open array or object: nothing written in it yet
	key   bool   // a key was just written, its value comes next

	scratch bytes.Buffer  // compact JSON of one Value
	enc     *json.Encoder // into scratch
	out     []byte        // what goes to w by one Write
}

// NewEncoder writes to w, one Write per token or Value: buffer it.
func NewEncoder(w io.Writer) *Encoder {
	e := &Encoder{w: w}
	e.enc = json.NewEncoder(&e.scratch)
	e.enc.SetEscapeHTML(false)
	return e
}

// Err is the first error met.
func (e *Encoder) Err() error { return e.err }

func (e *Encoder) flush() error {
	if e.err == nil {
		_, e.err = e.w.Write(e.out)
	}
	e.out = e.out[:0]
	return e.err
}

// lead writes what comes before an element: comma, newline and indentation; nothing after a key.
func (e *Encoder) lead() {
	if e.key {
		e.key = false
		return
	}
	if e.depth == 0 {
		return
	}
	if !e.first[e.depth-1] {
		e.out = append(e.out, ',')
	}
	e.first[e.depth-1] = false
	e.newline(e.depth)
}

func (e *Encoder) newline(depth int) {
	e.out = append(e.out, '\n')
	for range depth {
		e.out = append(e.out, ' ', ' ')
	}
}

func (e *Encoder) open(c byte) error {
	e.lead()
	e.out = append(e.out, c)
	e.first = append(e.first, true)
	e.depth++
	return e.flush()
}

func (e *Encoder) close(c byte) error {
	if e.depth == 0 {
		return e.err
	}
	e.depth--
	if !e.first[e.depth] {
		e.newline(e.depth)
	}
	e.first = e.first[:e.depth]
	e.out = append(e.out, c)
	return e.flush()
}

// BeginObject opens an object; Key and a value per member follow, then EndObject.
func (e *Encoder) BeginObject() error { return e.open('{') }

// EndObject closes the innermost object.
func (e *Encoder) EndObject() error { return e.close('}') }

// BeginArray opens an array; values follow, then EndArray.
func (e *Encoder) BeginArray() error { return e.open('[') }

// EndArray closes the innermost array.
func (e *Encoder) EndArray() error { return e.close(']') }

// Key starts a member of the open object.
func (e *Encoder) Key(k string) error {
	e.lead()
	if err := e.compact(k); err != nil {
		return err
	}
	e.out = append(e.out, e.scratch.Bytes()...)
	e.out = append(e.out, ':', ' ')
	e.key = true
	return e.flush()
}

// compact puts the JSON of v into scratch.
func (e *Encoder) compact(v any) error {
	if e.err != nil {
		return e.err
	}
	e.scratch.Reset()
	if err := e.enc.Encode(v); err != nil {
		e.err = err
		return err
	}
	e.scratch.Truncate(e.scratch.Len() - 1) // Encode ends with a newline
	return nil
}

// Value writes v, which is anything that encoding/json takes. Keys of objects come out sorted at every
// level: that costs nothing where v's type has its fields in that order, and a second pass where not.
func (e *Encoder) Value(v any) error {
	if err := e.compact(v); err != nil {
		return err
	}
	e.lead()
	start := len(e.out)
	if !e.pretty(e.scratch.Bytes()) {
		// Some object's keys were out of order: decode to maps, which encoding/json writes sorted.
		e.out = e.out[:start]
		d := json.NewDecoder(bytes.NewReader(e.scratch.Bytes()))
		d.UseNumber()
		var generic any
		if err := d.Decode(&generic); err != nil {
			e.err = err
			return err
		}
		if err := e.compact(generic); err != nil {
			return err
		}
		e.pretty(e.scratch.Bytes())
	}
	return e.flush()
}

// pretty appends the compact JSON c indented. It reports false where it met keys out of order; the
// output is then unusable unless it cannot be helped (keys that sort differently escaped and unescaped).
// c comes from encoding/json, so its syntax is not checked.
func (e *Encoder) pretty(c []byte) (sorted bool) {
	type frame struct {
		object bool
		key    []byte // the last key
	}
	var stack []frame
	sorted = true
	expectKey := false
	for i := 0; i < len(c); {
		switch b := c[i]; b {
		case '{', '[':
			if c[i+1] == b+2 { // '}' is '{'+2 and ']' is '['+2
				e.out = append(e.out, b, b+2)
				i += 2
				continue
			}
			stack = append(stack, frame{object: b == '{'})
			e.out = append(e.out, b)
			e.newline(e.depth + len(stack))
			expectKey = b == '{'
			i++
		case '}', ']':
			stack = stack[:len(stack)-1]
			e.newline(e.depth + len(stack))
			e.out = append(e.out, b)
			i++
		case ',':
			e.out = append(e.out, ',')
			e.newline(e.depth + len(stack))
			expectKey = len(stack) > 0 && stack[len(stack)-1].object
			i++
		case ':':
			e.out = append(e.out, ':', ' ')
			i++
		case '"':
			j := i + 1
			for c[j] != '"' {
				if c[j] == '\\' {
					j++
				}
				j++
			}
			j++
			if expectKey {
				f := &stack[len(stack)-1]
				k := c[i+1 : j-1] // without quotes, so that a key sorts before those it is a prefix of
				if f.key != nil && bytes.Compare(f.key, k) > 0 {
					sorted = false
				}
				f.key = k
				expectKey = false
			}
			e.out = append(e.out, c[i:j]...)
			i = j
		default: // a number or a literal
			j := i + 1
			for j < len(c) && c[j] != ',' && c[j] != '}' && c[j] != ']' {
				j++
			}
			e.out = append(e.out, c[i:j]...)
			i = j
		}
	}
	return sorted
}
