package admin

import "io"

// Raw writes one value whose bytes f produces itself: valid JSON, already indented for its depth. f is
// handed the dump's own bounded writer.
func (e *Encoder) Raw(f func(w io.Writer) error) error {
	e.lead()
	if err := e.flush(); err != nil {
		return err
	}
	if err := f(e.w); err != nil && e.err == nil {
		e.err = err
	}
	return e.err
}
