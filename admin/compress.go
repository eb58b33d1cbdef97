package admin

import (
	"compress/gzip"
	"compress/zlib"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/andybalholm/brotli"
	"github.com/klauspost/compress/zstd"
)

// encodings are the content encodings that can be had, in the order of our own liking: what costs least
// processor time for what it saves comes first.
var encodings = [...]string{"zstd", "gzip", "br", "deflate"}

// compressors keeps used ones for the next scrape: a new one takes up to 1.4 MB.
type compressors struct {
	pools [len(encodings)]sync.Pool // of resettable
}

// resettable is what the four have in common.
type resettable interface {
	io.WriteCloser
	Reset(io.Writer)
}

// open wraps w for an encoding of encodings; "" passes through. Closing what it returns ends the stream and
// leaves w open; it must not be used after that. All are at their fastest and smallest setting: a scrape
// must not be felt.
func (c *compressors) open(w io.Writer, encoding string) io.WriteCloser {
	i := slices.Index(encodings[:], encoding)
	if i < 0 {
		return nopCloser{w}
	}
	z, ok := c.pools[i].Get().(resettable)
	if !ok {
		z = newCompressor(encoding)
	}
	z.Reset(w)
	return &pooled{z, &c.pools[i]}
}

func newCompressor(encoding string) resettable {
	switch encoding {
	case "zstd":
		z, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1),
			zstd.WithLowerEncoderMem(true), zstd.WithWindowSize(128<<10))
		if err != nil {
			panic(err) // the options are valid
		}
		return z
	case "br":
		return brotli.NewWriterLevel(nil, 1)
	case "deflate": // which is zlib's format (RFC 9110 section 8.4.1.2)
		z, _ := zlib.NewWriterLevel(nil, zlib.BestSpeed) // the level is valid
		return z
	}
	z, _ := gzip.NewWriterLevel(nil, gzip.BestSpeed)
	return z
}

type pooled struct {
	resettable
	pool *sync.Pool
}

func (p *pooled) Close() error {
	err := p.resettable.Close()
	p.resettable.Reset(nil) // lets go of the connection
	p.pool.Put(p.resettable)
	return err
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

// contentEncoding picks what the client likes best of what can be had, and of equals what we like best; ""
// is none (RFC 9110 section 12.5.3). A "*" alone is answered with gzip, which everybody reads.
func contentEncoding(accept []string) string {
	quality := map[string]float64{}
	for _, line := range accept {
		for e := range strings.SplitSeq(line, ",") {
			name, params, _ := strings.Cut(e, ";")
			q := 1.0
			for p := range strings.SplitSeq(params, ";") {
				if v, ok := strings.CutPrefix(strings.TrimSpace(strings.ToLower(p)), "q="); ok {
					var err error
					if q, err = strconv.ParseFloat(v, 64); err != nil {
						q = 0
					}
				}
			}
			switch name = strings.ToLower(strings.TrimSpace(name)); name {
			case "*":
				if _, named := quality["gzip"]; !named {
					quality["gzip"] = q
				}
			case "x-gzip": // RFC 9110: the same
				quality["gzip"] = q
			default:
				quality[name] = q
			}
		}
	}
	best, bestQ := "", 0.0
	for _, name := range encodings {
		if q := quality[name]; q > bestQ {
			best, bestQ = name, q
		}
	}
	if quality["identity"] > bestQ {
		return ""
	}
	return best
}
