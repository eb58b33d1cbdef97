package main

import (
	"errors"
	"fmt"
	"math"
	"math/bits"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// durationUnit gives the length of a unit of ztunnel's durations, in whatever case it is written; no unit
// is seconds. A month has 30 days, a year 365.
func durationUnit(name string) (time.Duration, bool) {
	const day = 24 * time.Hour
	switch strings.ToLower(name) {
	case "ns", "nsec", "nanosecond":
		return time.Nanosecond, true
	// micro sign and Greek mu
	case "us", "usec", "usecond", "microsecond", "µs", "µsec", "µsecond", "μs", "μsec", "μsecond":
		return time.Microsecond, true
	case "ms", "msec", "millisecond":
		return time.Millisecond, true
	case "", "s", "sec", "second":
		return time.Second, true
	case "m", "min", "minute":
		return time.Minute, true
	case "h", "hr", "hour":
		return time.Hour, true
	case "d", "day":
		return day, true
	case "w", "week":
		return 7 * day, true
	case "mon", "month":
		return 30 * day, true
	case "y", "year":
		return 365 * day, true
	}
	return 0, false
}

var (
	errDurationForm  = errors.New("no duration; write it like 300s, 5m, 1h30m or 100ms")
	errDurationRange = errors.New("a duration of more than 292 years")
)

// parseDuration reads ztunnel's durations (spec controlplane 1.1, that is the crate duration-str): numbers
// with units, joined by nothing or + (a sum), or by * (a product, of seconds: 1m*10 is ten minutes). Spaces
// may stand anywhere between them. A number without a unit is seconds, and only the last one of a sequence
// or one before an operator may lack it. Sums and products in one expression are refused, as there.
func parseDuration(s string) (time.Duration, error) {
	rest := strings.TrimSpace(s)
	if rest == "" {
		return 0, errors.New("empty; a duration is written like 300s, 5m, 1h30m or 100ms")
	}
	total, used := time.Duration(0), byte(0) // used is the operator so far
	for op := byte('+'); ; {
		value, after, err := durationTerm(rest)
		if err != nil {
			return 0, fmt.Errorf("%q is %w", s, err)
		}
		switch {
		case used == 0 && op == '+': // the first term, which no operator precedes
			total = value
		case op == '+':
			if value > math.MaxInt64-total {
				return 0, fmt.Errorf("%q is %w", s, errDurationRange)
			}
			total += value
		default:
			hi, lo := bits.Mul64(uint64(total), uint64(value))
			if hi >= uint64(time.Second) {
				return 0, fmt.Errorf("%q is %w", s, errDurationRange)
			}
			q, _ := bits.Div64(hi, lo, uint64(time.Second))
			if q > math.MaxInt64 {
				return 0, fmt.Errorf("%q is %w", s, errDurationRange)
			}
			total = time.Duration(q)
		}
		if rest = after; rest == "" {
			return total, nil
		}
		op = '+'
		if rest[0] == '+' || rest[0] == '*' {
			op, rest = rest[0], strings.TrimSpace(rest[1:])
		}
		if used != 0 && used != op {
			return 0, fmt.Errorf("%q mixes sums and products", s)
		}
		used = op
	}
}

// durationTerm reads one number with its unit, and the spaces after it.
func durationTerm(s string) (value time.Duration, rest string, err error) {
	digits := len(s) - len(strings.TrimLeft(s, "0123456789"))
	n, err := strconv.ParseInt(s[:digits], 10, 64)
	switch {
	case errors.Is(err, strconv.ErrRange):
		return 0, "", errDurationRange
	case err != nil:
		return 0, "", errDurationForm
	}
	rest = strings.TrimLeftFunc(s[digits:], unicode.IsSpace)
	letters := strings.IndexFunc(rest, func(r rune) bool { return !unicode.IsLetter(r) || r == utf8.RuneError })
	if letters < 0 {
		letters = len(rest)
	}
	unit, ok := durationUnit(rest[:letters])
	if !ok || letters == 0 && rest != "" && rest[0] != '+' && rest[0] != '*' {
		return 0, "", errDurationForm
	}
	if n > math.MaxInt64/int64(unit) {
		return 0, "", errDurationRange
	}
	return time.Duration(n) * unit, strings.TrimLeftFunc(rest[letters:], unicode.IsSpace), nil
}
