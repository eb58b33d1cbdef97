package admin

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"math"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestEncoderSamples writes real dumps again, whole and member by member, and expects the same bytes.
func TestEncoderSamples(t *testing.T) {
	for _, name := range []string{"config_dump-a.json", "config_dump-inpod-a.json"} {
		want, err := os.ReadFile("../docs/samples/" + name)
		if err != nil {
			t.Fatal(err)
		}
		want = bytes.TrimRight(want, "\n")
		var v map[string]any
		d := json.NewDecoder(bytes.NewReader(want))
		d.UseNumber()
		if err := d.Decode(&v); err != nil {
			t.Fatal(err)
		}
		var whole, streamed bytes.Buffer
		if err := NewEncoder(&whole).Value(v); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(string(want), whole.String()); d != "" {
			t.Errorf("%s by Value:\n%s", name, d)
		}
		e := NewEncoder(&streamed)
		stream(e, v)
		if err := e.Err(); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(string(want), streamed.String()); d != "" {
			t.Errorf("%s streamed:\n%s", name, d)
		}
	}
}

// stream writes v by the smallest steps there are.
func stream(e *Encoder, v any) {
	switch v := v.(type) {
	case map[string]any:
		e.BeginObject()
		for _, k := range sortedKeys(v) {
			e.Key(k)
			stream(e, v[k])
		}
		e.EndObject()
	case []any:
		e.BeginArray()
		for _, x := range v {
			stream(e, x)
		}
		e.EndArray()
	default:
		e.Value(v)
	}
}

func sortedKeys(m map[string]any) []string {
	b, _ := json.Marshal(m) // sorts
	d := json.NewDecoder(bytes.NewReader(b))
	var ks []string
	d.Token()
	for d.More() {
		k, _ := d.Token()
		ks = append(ks, k.(string))
		var skip json.RawMessage
		d.Decode(&skip)
	}
	return ks
}

func TestEncoderSortsAndEscapes(t *testing.T) {
	v := struct {
		Z string         `json:"z"`
		A map[string]int `json:"a"`
		M []struct {
			Y, B int
			E    struct{}
		} `json:"m"`
		N *int    `json:"n"`
		F float64 `json:"f"`
		I uint64  `json:"i"`
	}{Z: "<&>\"\\\n{}[],:", A: map[string]int{"ab": 1, "a": 2}, F: 1e21, I: math.MaxUint64}
	v.M = append(v.M, struct {
		Y, B int
		E    struct{}
	}{1, 2, struct{}{}})
	var b bytes.Buffer
	e := NewEncoder(&b)
	e.BeginArray()
	e.Value(v)
	e.Value([]int{})
	e.Value("s")
	e.EndArray()
	want := `[
  {
    "a": {
      "a": 2,
      "ab": 1
    },
    "f": 1e+21,
    "i": 18446744073709551615,
    "m": [
      {
        "B": 2,
        "E": {},
        "Y": 1
      }
    ],
    "n": null,
    "z": "<&>\"\\\n{}[],:"
  },
  [],
  "s"
]`
	if e.Err() != nil || b.String() != want {
		t.Errorf("%v: got\n%s\nwant\n%s", e.Err(), b.String(), want)
	}
}

type failWriter struct{ after int }

func (f *failWriter) Write(p []byte) (int, error) {
	if f.after--; f.after < 0 {
		return 0, io.ErrShortWrite
	}
	return len(p), nil
}

func TestEncoderErrors(t *testing.T) {
	e := NewEncoder(io.Discard)
	if err := e.Value(make(chan int)); err == nil {
		t.Error("a channel was encoded")
	}
	if err := e.Value(1); err == nil || e.Err() == nil {
		t.Error("errors do not stick")
	}
	e = NewEncoder(&failWriter{after: 2})
	e.BeginArray()
	e.Value(1)
	for range 3 {
		if err := e.Value(2); !errors.Is(err, io.ErrShortWrite) {
			t.Errorf("got %v", err)
		}
	}
	if NewEncoder(io.Discard).EndArray() != nil {
		t.Error("an end too many")
	}
}

func FuzzEncoder(f *testing.F) {
	f.Add(`{"b":[1,{"y":[],"x":{}}],"a":"\"\\u2028<"}`)
	f.Add(`[[[]],{},"",-1.5e3,null,true]`)
	f.Add(`{"a\n":1,"a\"":2}`)
	f.Fuzz(func(t *testing.T, in string) {
		var v any
		d := json.NewDecoder(strings.NewReader(in))
		d.UseNumber()
		if !json.Valid([]byte(in)) || d.Decode(&v) != nil {
			return
		}
		var want bytes.Buffer
		we := json.NewEncoder(&want)
		we.SetEscapeHTML(false)
		we.SetIndent("", "  ")
		if we.Encode(v) != nil {
			return
		}
		var got bytes.Buffer
		// RawMessage keeps the order of the input, so the sorting has work to do.
		if err := NewEncoder(&got).Value(json.RawMessage(in)); err != nil {
			t.Fatal(err)
		}
		if !json.Valid(got.Bytes()) {
			t.Fatalf("not JSON: %s", got.Bytes())
		}
		got.Reset()
		NewEncoder(&got).Value(v)
		if got.String()+"\n" != want.String() {
			t.Fatalf("got\n%s\nwant\n%s", got.String(), want.String())
		}
	})
}

// BenchmarkValue is one workload of a dump, with its fields in order and out of order.
func BenchmarkValue(b *testing.B) {
	sorted := struct {
		A, B, C string
		D       []string
		E       map[string]int
	}{strings.Repeat("a", 100), strings.Repeat("b", 100), strings.Repeat("c", 100), []string{"10.0.0.1"},
		map[string]int{"80": 9000}}
	unsorted := struct {
		E       map[string]int
		D       []string
		C, B, A string
	}{sorted.E, sorted.D, sorted.C, sorted.B, sorted.A}
	for name, v := range map[string]any{"sorted": sorted, "unsorted": unsorted} {
		b.Run(name, func(b *testing.B) {
			e := NewEncoder(io.Discard)
			e.BeginArray()
			b.ReportAllocs()
			for b.Loop() {
				e.Value(v)
			}
		})
	}
}
