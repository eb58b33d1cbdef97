package admin

import (
	"compress/gzip"
	"compress/zlib"
	"io"
	"strconv"
	"strings"

	"github.com/andybalholm/brotli"
	"github.com/klauspost/compress/zstd"
)

// encodings are the content encodings that can be had, in the order of our own liking: what costs least
// processor time for what it saves comes first.
var encodings = [...]string{"zstd", "gzip", "br", "deflate"}

// compressor wraps w for an encoding of encodings; "" passes through. Close ends the stream and leaves w
// open. All are at their fastest setting and with little memory: a scrape must not be felt.
func compressor(w io.Writer, encoding string) io.WriteCloser {
	switch encoding {
	case "zstd":
		z, err := zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1),
			zstd.WithLowerEncoderMem(true), zstd.WithWindowSize(128<<10))
		if err == nil { // the options are valid
			return z
		}
	case "gzip":
		z, _ := gzip.NewWriterLevel(w, gzip.BestSpeed) // the level is valid
		return z
	case "br":
		return brotli.NewWriterLevel(w, 1)
	case "deflate": // which is zlib's format (RFC 9110 section 8.4.1.2)
		z, _ := zlib.NewWriterLevel(w, zlib.BestSpeed)
		return z
	}
	return nopCloser{w}
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
