package main

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"ztun/admin/guard"
	"ztun/proxy/state"
)

// These make the set functions of the table: each reads one value into *p (spec controlplane 1.1). "" is a
// value like any other: no boolean, no number, no duration.

func str(p *string) func(string) error {
	return func(v string) error { *p = v; return nil }
}

// optional keeps apart what is not set and what is set to "".
func optional(p **string, parse func(string) (string, error)) func(string) error {
	return func(v string) error {
		v, err := parse(v)
		*p = &v
		return err
	}
}

func parseBool(v string) (bool, error) {
	if v != "true" && v != "false" {
		return false, errors.New("must be true or false")
	}
	return v == "true", nil
}

func boolean(p *bool) func(string) error {
	return func(v string) (err error) { *p, err = parseBool(v); return err }
}

func optionalBool(p **bool) func(string) error {
	return func(v string) error {
		b, err := parseBool(v)
		*p = &b
		return err
	}
}

// onlyBool is a boolean of which one value does not apply here.
func onlyBool(want bool, why string) func(string) error {
	return func(v string) error {
		b, err := parseBool(v)
		if err == nil && b != want {
			err = errors.New(why)
		}
		return err
	}
}

// exactly is true for "true" and false for all else, as ztunnel reads a few of its variables.
func (c *Config) exactly(p *bool, name string) func(string) error {
	return func(v string) error {
		*p = v == "true"
		if v != "" && v != "true" && v != "false" {
			c.warn("%s=%q is read as false: only true switches it on", name, v)
		}
		return nil
	}
}

func proxyMode(dedicated *bool) func(string) error {
	return func(v string) error {
		if v != "shared" && v != "dedicated" {
			return errors.New("must be shared or dedicated")
		}
		*dedicated = v == "dedicated"
		return nil
	}
}

// parseWorkloadInfo reads ztunnel's namespace/name/service-account.
func parseWorkloadInfo(v string) (namespace, name, serviceAccount string, err error) {
	parts := strings.SplitN(v, "/", 3)
	if len(parts) != 3 || parts[0] == "" || parts[1] == "" || parts[2] == "" {
		return "", "", "", errors.New("must be NAMESPACE/NAME/SERVICE_ACCOUNT")
	}
	return parts[0], parts[1], parts[2], nil
}

func proxyWorkloadInfo(p *state.WorkloadInfo) func(string) error {
	return func(v string) (err error) {
		p.Namespace, p.Name, p.ServiceAccount, err = parseWorkloadInfo(v)
		return err
	}
}

func compliancePolicy(p *bool) func(string) error {
	return func(v string) error {
		if v != "" && v != "pqc" {
			return errors.New("only pqc is known; for FIPS 140-3 run with GODEBUG=fips140=on")
		}
		*p = v == "pqc"
		return nil
	}
}

func unknownPolicy(deny *bool) func(string) error {
	return func(v string) error {
		if v != "skip" && v != "deny" {
			return errors.New("neither skip nor deny")
		}
		*deny = v == "deny"
		return nil
	}
}

func duration(p *time.Duration) func(string) error {
	return func(v string) (err error) { *p, err = parseDuration(v); return err }
}

func uint32v(p *uint32, lo, hi uint64) func(string) error {
	return func(v string) error {
		n, err := strconv.ParseUint(v, 10, 32)
		if err != nil || n < lo || n > hi {
			return fmt.Errorf("must be a decimal number from %d to %d", lo, hi)
		}
		*p = uint32(n)
		return nil
	}
}

func uint16v[T uint16 | int](p *T, lo uint64) func(string) error {
	return func(v string) error {
		n, err := strconv.ParseUint(v, 10, 16)
		if err != nil || n < lo {
			return fmt.Errorf("must be a decimal number from %d to 65535", lo)
		}
		*p = T(n)
		return nil
	}
}

func ranged(p *int, lo, hi int) func(string) error {
	return func(v string) error {
		n, err := strconv.Atoi(v)
		if err != nil || n < lo || n > hi {
			return fmt.Errorf("must be a decimal number from %d to %d", lo, hi)
		}
		*p = n
		return nil
	}
}

// maxCPUs bounds every count of processors.
const maxCPUs = 1 << 16

// quantity reads a Kubernetes CPU quantity ("2", "1.5", "500m"), rounded up to whole processors.
func quantity(p *int) func(string) error {
	return func(v string) error {
		number, div := v, 1.0
		if s, ok := strings.CutSuffix(v, "m"); ok {
			number, div = s, 1000
		}
		f, err := strconv.ParseFloat(number, 64)
		if err != nil || !(f > 0) || f/div > maxCPUs {
			return fmt.Errorf("must be a CPU quantity above 0 and at most %d, such as 2, 1.5 or 500m", maxCPUs)
		}
		*p = int(math.Ceil(f / div))
		return nil
	}
}

// tokenFile is a file that has a token already: a typing error must not leave the server unguarded, or closed.
func tokenFile(p *string) func(string) error {
	return func(v string) error {
		if v == "" {
			return nil
		}
		if _, err := guard.ReadToken(v); err != nil {
			return err
		}
		*p = v
		return nil
	}
}

func deviceName(p *string) func(string) error {
	return func(v string) error {
		if v == "" || len(v) > 15 || strings.ContainsAny(v, "/ \t%") {
			return errors.New("must be a device name of 1 to 15 characters")
		}
		*p = v
		return nil
	}
}

// domains is a list of DNS domains, separated by commas.
func domains(p *[]string) func(string) error {
	return func(s string) error {
		*p = nil
		for _, d := range strings.Split(s, ",") {
			d = strings.Trim(strings.TrimSpace(d), ".")
			if d == "" {
				continue
			}
			if strings.ContainsAny(d, " \t/:") || len(d) > 253 {
				return fmt.Errorf("%q is no domain", d)
			}
			*p = append(*p, d)
		}
		return nil
	}
}
