package hbone

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"hash"
	"io"
	"net"
	"sync/atomic"
)

// TLS 1.3 records (RFC 8446, 5).
const (
	recordHead     = 5
	recordTag      = 16
	recordOverhead = recordHead + 1 + recordTag
	maxCiphertext  = recordLen + 256

	typeChangeCipherSpec = 20
	typeAlert            = 21
	typeHandshake        = 22
	typeApplicationData  = 23

	messageNewSessionTicket = 4
	messageKeyUpdate        = 24

	alertCloseNotify       = 0
	alertUnexpectedMessage = 10
	alertBadRecordMAC      = 20
	alertRecordOverflow    = 22
	alertIllegalParameter  = 47
	alertDecodeError       = 50
	alertUserCanceled      = 90

	// maxHandshakeMessage bounds what is collected of a message after the handshake, in bytes.
	maxHandshakeMessage = 64 << 10
	// maxUseless is how many records in a row may carry no application data (crypto/tls has the same bound).
	maxUseless = 16
	// rekeyAfter is how many records one key seals: below the 2^24.5 of RFC 8446, 5.5.
	rekeyAfter = 1 << 24
	// firstRekey is how many the first key of a connection seals. So few, so that changing keys is what every longer
	// connection does, with every kind of peer, and not what happens after 256 GiB for the first time.
	firstRekey = 100
	// keyUpdates is how many times a peer may change its key in a burst (and a sixteenth of it per second): each costs us
	// as much as some ten records.
	keyUpdates = 256
)

// direction is one direction's keys.
type direction struct {
	suite  uint16
	secret []byte
	aead   cipher.AEAD
	iv     [12]byte
	seq    uint64
	keys   uint64 // how many there were before this one
	guard  guard
}

func newDirection(suite uint16, secret []byte) (*direction, error) {
	h := &direction{suite: suite, secret: secret}
	return h, h.derive()
}

// params are the suite's hash and key length.
func (h *direction) params() (func() hash.Hash, int, error) {
	switch h.suite {
	case tls.TLS_AES_128_GCM_SHA256:
		return sha256.New, 16, nil
	case tls.TLS_AES_256_GCM_SHA384:
		return sha512.New384, 32, nil
	}
	return nil, 0, errSuite
}

// derive makes key and IV from the traffic secret (RFC 8446, 7.3).
func (h *direction) derive() error {
	hash, keyLen, err := h.params()
	if err != nil {
		return err
	}
	if len(h.secret) != hash().Size() {
		return errSuite
	}
	key, err := expandLabel(hash, h.secret, "key", keyLen)
	if err != nil {
		return err
	}
	iv, err := expandLabel(hash, h.secret, "iv", len(h.iv))
	if err != nil {
		return err
	}
	copy(h.iv[:], iv)
	block, err := aes.NewCipher(key)
	if err != nil {
		return err
	}
	h.aead, err = cipher.NewGCM(block)
	h.seq = 0
	return err
}

// update moves on to the next traffic secret (RFC 8446, 7.2).
func (h *direction) update() error {
	hash, _, err := h.params()
	if err != nil {
		return err
	}
	if h.secret, err = expandLabel(hash, h.secret, "traffic upd", hash().Size()); err != nil {
		return err
	}
	h.keys++
	return h.derive()
}

// expandLabel is HKDF-Expand-Label with an empty context (RFC 8446, 7.1).
func expandLabel(hash func() hash.Hash, secret []byte, label string, n int) ([]byte, error) {
	info := binary.BigEndian.AppendUint16(nil, uint16(n))
	info = append(info, byte(len("tls13 ")+len(label)))
	info = append(info, "tls13 "+label...)
	info = append(info, 0)
	return hkdf.Expand(hash, secret, string(info), n)
}

// nonce is the IV xor the record's number, which it counts up.
func (h *direction) nonce(to *[12]byte) {
	*to = h.iv
	n := binary.BigEndian.Uint64(to[4:]) ^ h.seq
	binary.BigEndian.PutUint64(to[4:], n)
	h.seq++
}

// records is the transport of TLS 1.3. One goroutine opens (wait, fill), one at a time seals; a guard watches over it.
type records struct {
	*wire
	client     bool
	in, out    *direction
	updates    bucket // of the peer's key
	adopted    bool   // by a ClientConn or ServerConn
	hand       []byte // an unfinished handshake message
	useless    int
	err        error         // of the reading side, sticky
	answer     atomic.Bool   // the peer asked for a KeyUpdate
	fatal      atomic.Uint32 // the alert for a violation that we found
	inNonce    [12]byte
	outNonce   [12]byte
	rekeyAfter uint64 // 0: the constants; tests choose
}

func newRecords(w *wire, in, out *direction, client bool) *records {
	return &records{wire: w, in: in, out: out, client: client, updates: newBucket(keyUpdates, keyUpdates/16)}
}

func (r *records) adopt(b *Buffers) {
	r.adopted = true
	r.bufs = b
}

// next is the length of the complete record at the front, with its header; 0 if there is none yet.
func (r *records) next() int {
	b := r.bytes()
	if len(b) < recordHead {
		return 0
	}
	n := recordHead + int(binary.BigEndian.Uint16(b[3:]))
	if n > recordHead+maxCiphertext {
		return recordHead // fill looks at the header first and finds the fault
	}
	if len(b) < n {
		return 0
	}
	return n
}

func (r *records) wait() error {
	if r.err != nil {
		return r.err
	}
	for r.next() == 0 {
		if err := r.more(); err != nil {
			if err == io.EOF {
				// Without close_notify: the connection was cut (or attacked).
				err = io.ErrUnexpectedEOF
			}
			return err
		}
	}
	return nil
}

func (r *records) pending() bool { return r.err == nil && r.next() != 0 }
func (r *records) urgent() bool  { return r.answer.Load() }

// fill opens complete records into b while they fit. After an error it keeps to it.
func (r *records) fill(b []byte) (n int, err error) {
	if r.err != nil {
		return 0, r.err
	}
	if err := r.in.guard.begin(); err != nil {
		return 0, err
	}
	defer r.in.guard.end()
	for {
		size := r.next()
		if size == 0 || len(b)-n < size-recordHead-recordTag {
			return n, nil
		}
		m, err := r.open(b[n:], r.bytes()[:size])
		r.skip(size)
		n += m
		if err != nil {
			r.err = err
			var alert tls.AlertError
			if oe, ok := err.(*net.OpError); ok && oe.Op == "local error" && errors.As(oe.Err, &alert) {
				r.fatal.Store(uint32(alert))
			}
			return n, err
		}
	}
}

// open decrypts one record into dst and returns how much application data that gave.
func (r *records) open(dst, rec []byte) (int, error) {
	length := int(binary.BigEndian.Uint16(rec[3:]))
	switch {
	case length > maxCiphertext:
		return 0, localAlert(alertRecordOverflow)
	case rec[0] != typeApplicationData:
		return 0, localAlert(alertUnexpectedMessage)
	case length < recordTag+1:
		return 0, localAlert(alertBadRecordMAC)
	}
	r.in.nonce(&r.inNonce)
	plain, err := r.in.aead.Open(dst[:0], r.inNonce[:], rec[recordHead:], rec[:recordHead])
	if err != nil {
		return 0, localAlert(alertBadRecordMAC)
	}
	n := len(plain) - 1
	for n >= 0 && plain[n] == 0 {
		n--
	}
	if n < 0 {
		return 0, localAlert(alertUnexpectedMessage)
	}
	if n > recordLen {
		return 0, localAlert(alertRecordOverflow)
	}
	typ := plain[n]
	plain = plain[:n]
	if typ == typeApplicationData && len(r.hand) > 0 {
		return 0, localAlert(alertUnexpectedMessage) // in the middle of a handshake message
	}
	if typ == typeApplicationData && n > 0 {
		r.useless = 0
		return n, nil
	}
	if r.useless++; r.useless > maxUseless {
		return 0, localAlert(alertUnexpectedMessage)
	}
	switch typ {
	case typeApplicationData:
		return 0, nil
	case typeAlert:
		return 0, r.alert(plain)
	case typeHandshake:
		return 0, r.handshake(plain)
	}
	return 0, localAlert(alertUnexpectedMessage)
}

// alert is one from the peer: close_notify is the end, everything else but user_canceled an error.
func (r *records) alert(b []byte) error {
	if len(b) != 2 {
		return localAlert(alertUnexpectedMessage)
	}
	switch b[1] {
	case alertCloseNotify:
		return io.EOF
	case alertUserCanceled:
		return nil
	}
	return &net.OpError{Op: "remote error", Err: tls.AlertError(b[1])}
}

// handshake is a piece of post-handshake messages. Tickets are of no use to us; a KeyUpdate changes the keys, and
// must be the last thing before the change (RFC 8446, 5.1).
func (r *records) handshake(b []byte) error {
	if len(b) == 0 {
		return localAlert(alertUnexpectedMessage)
	}
	r.hand = append(r.hand, b...)
	for len(r.hand) >= 4 {
		n := 4 + int(r.hand[1])<<16 + int(r.hand[2])<<8 + int(r.hand[3])
		if n > maxHandshakeMessage {
			return localAlert(alertDecodeError)
		}
		if len(r.hand) < n {
			return nil
		}
		msg := r.hand[:n]
		r.hand = r.hand[n:]
		switch msg[0] {
		case messageNewSessionTicket:
			if !r.client {
				return localAlert(alertUnexpectedMessage)
			}
			if !validTicket(msg[4:]) {
				return localAlert(alertDecodeError)
			}
		case messageKeyUpdate:
			if n != 5 {
				return localAlert(alertDecodeError)
			}
			if len(r.hand) != 0 {
				return localAlert(alertUnexpectedMessage)
			}
			if msg[4] > 1 {
				return localAlert(alertIllegalParameter)
			}
			if !r.updates.take() {
				return localAlert(alertUnexpectedMessage)
			}
			if err := r.in.update(); err != nil {
				return err
			}
			if msg[4] == 1 {
				r.answer.Store(true)
			}
		default:
			return localAlert(alertUnexpectedMessage)
		}
	}
	if len(r.hand) == 0 {
		r.hand = nil
	}
	return nil
}

// validTicket reports whether b has the form of a NewSessionTicket (RFC 8446, 4.6.1).
func validTicket(b []byte) bool {
	vector := func(prefix int) (v []byte, ok bool) {
		if len(b) < prefix {
			return nil, false
		}
		n := int(b[0])
		if prefix == 2 {
			n = n<<8 | int(b[1])
		}
		if b = b[prefix:]; len(b) < n {
			return nil, false
		}
		v, b = b[:n], b[n:]
		return v, true
	}
	if len(b) < 8 { // lifetime and age
		return false
	}
	b = b[8:]
	_, ok1 := vector(1)
	_, ok2 := vector(2)
	extensions, ok3 := vector(2)
	if !ok1 || !ok2 || !ok3 || len(b) != 0 {
		return false
	}
	for b = extensions; len(b) > 0; {
		if len(b) < 2 {
			return false
		}
		early := b[0] == 0 && b[1] == 42
		b = b[2:]
		if data, ok := vector(2); !ok || early && len(data) != 4 {
			return false
		}
	}
	return true
}

// localAlert is a violation that we found.
func localAlert(code uint8) error {
	return &net.OpError{Op: "local error", Err: tls.AlertError(code)}
}

// seal appends plain as records of up to 16 KiB to out, after a KeyUpdate if one is due.
func (r *records) seal(out, plain []byte) ([]byte, error) {
	if err := r.out.guard.begin(); err != nil {
		return out, err
	}
	defer r.out.guard.end()
	for {
		if err := r.rekey(&out); err != nil {
			return out, err
		}
		if len(plain) == 0 {
			return out, nil
		}
		n := min(len(plain), recordLen)
		out = r.sealRecord(out, plain[:n], typeApplicationData)
		plain = plain[n:]
		if len(plain) == 0 {
			return out, nil
		}
	}
}

// rekey sends a KeyUpdate if the peer asked for one, or if the key has sealed enough.
func (r *records) rekey(out *[]byte) error {
	limit := r.rekeyAfter
	if limit == 0 {
		limit = rekeyAfter
		if r.out.keys == 0 {
			limit = firstRekey
		}
	}
	if r.out.seq < limit && !r.answer.Swap(false) {
		return nil
	}
	msg := [6]byte{messageKeyUpdate, 0, 0, 1, 0}
	*out = r.sealRecord(*out, msg[:5], typeHandshake)
	return r.out.update()
}

// sealRecord appends one record. The byte after plain holds its content type for a moment.
func (r *records) sealRecord(out, plain []byte, typ byte) []byte {
	n := len(plain)
	inner := plain[:n+1]
	saved := inner[n]
	inner[n] = typ
	out = append(out, typeApplicationData, 3, 3, byte((n+1+recordTag)>>8), byte(n+1+recordTag))
	r.out.nonce(&r.outNonce)
	out = r.out.aead.Seal(out, r.outNonce[:], inner, out[len(out)-recordHead:])
	inner[n] = saved
	return out
}

// closeNotify is close_notify, or the alert for what was wrong with the peer's records. Nothing can be sealed after it.
func (r *records) closeNotify(out []byte) []byte {
	if r.out.guard.begin() != nil {
		return out
	}
	defer r.out.guard.end()
	r.out.guard.over = true
	msg := [3]byte{1, alertCloseNotify}
	if code := r.fatal.Load(); code != 0 {
		msg[0], msg[1] = 2, byte(code)
	}
	return r.sealRecord(out, msg[:2], typeAlert)
}
