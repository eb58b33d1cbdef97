package control

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"ztun/admin/pb/discoverypb"
)

// Bounds of a subscription.
const (
	maxNames      = 20_000 // names subscribed to on demand
	maxNameLength = 1024   // bytes
)

// subscription is one type on one stream: what the node wants, what it has, and what is under way. Pure; it belongs to
// the stream's goroutine.
type subscription struct {
	typeURL  string
	node     string
	workload string // uid, of a workload that is a member by itself; "": a node
	wildcard bool
	names    map[string]struct{}

	snap    *snapshot         // the newest; nil before the first good one
	initial map[string]string // what the node reported to have, until there is a snapshot to compare it with
	target  *table            // what the node should have of it
	known   [shardCount]*shard
	gone    map[string]struct{} // what the node has and should not, of shards that are otherwise done
	asked   []string            // names to answer, whether the node has them or not
	due     bool                // an answer is owed even if it is empty
	begun   bool                // the first request has been seen

	nonces uint64
	flight *message // sent and not replied to
	stats  typeCounters
}

// typeCounters is what a subscription tells the status.
type typeCounters struct {
	sent, acked          *message // the last
	synced               uint64   // the newest snapshot version that the node has entirely
	messages             uint64
	resources, removed   uint64
	acks, nacks, stale   uint64
	lastNACK             string
	lastNACKNonce        string
	lastNACKAt, lastSent time.Time
	lastReply            time.Time
}

// message is one response.
type message struct {
	nonce    string
	version  uint64 // of the snapshot that it is made from
	complete bool   // with it the node has all of that snapshot
	items    []item
	removed  []string
}

// item is a resource in a message. extra are subscribed names that led to it and are not among its aliases.
type item struct {
	*resource
	extra []string
}

func newSubscription(typeURL, node string) *subscription {
	return &subscription{typeURL: typeURL, node: node, names: make(map[string]struct{}), gone: make(map[string]struct{}),
		target: &table{}}
}

// request takes in a request of this type. An error ends the stream.
func (d *subscription) request(req *discoverypb.DeltaDiscoveryRequest, now time.Time) error {
	first := !d.begun
	d.begun = true
	if first {
		d.due = true
	} else if req.ResponseNonce != "" || req.ErrorDetail != nil {
		d.reply(req, now)
	}
	subscribe, unsubscribe := req.ResourceNamesSubscribe, req.ResourceNamesUnsubscribe
	if first {
		// No names at all is the older way to say "*".
		d.wildcard = len(subscribe) == 0
	}
	var added []string
	for _, name := range subscribe {
		if name == "*" {
			d.wildcard = true
			continue
		}
		if err := d.subscribe(name); err != nil {
			return err
		}
		added = append(added, name)
	}
	narrowed := false
	for _, name := range unsubscribe {
		if name == "*" {
			narrowed = narrowed || d.wildcard
			d.wildcard = false
		} else if _, ok := d.names[name]; ok {
			delete(d.names, name)
			narrowed = true
		}
	}
	if first && !d.wildcard {
		// What a node has it goes on to want: ztunnel's names asked for on earlier streams are here alone.
		for name := range req.InitialResourceVersions {
			if err := d.subscribe(name); err != nil {
				return err
			}
		}
	}
	if first {
		d.initial = req.InitialResourceVersions
	}
	for _, name := range added {
		if _, still := d.names[name]; still {
			d.asked = append(d.asked, name)
		}
	}
	if len(d.asked) > 2*maxNames {
		return fmt.Errorf("more than %d names are waiting for an answer", 2*maxNames)
	}
	switch {
	case d.snap == nil:
	case first || narrowed || d.wildcard:
		d.retarget()
		if narrowed && !first {
			d.forget()
		}
	default:
		for _, name := range added {
			d.target = d.target.plus(d.snap.withBackers(d.snap.resolve(d.typeURL, name)))
		}
	}
	return nil
}

func (d *subscription) subscribe(name string) error {
	if len(name) > maxNameLength {
		return fmt.Errorf("a subscribed name is longer than %d bytes", maxNameLength)
	}
	if d.names[name] = struct{}{}; len(d.names) > maxNames {
		return fmt.Errorf("more than %d names are subscribed to: subscribe to *", maxNames)
	}
	return nil
}

// reply takes in an ACK or a NACK. A NACKed message is not sent again: the node has applied what is good of it, and
// the rest would be refused again. Its reconnect asks for it.
func (d *subscription) reply(req *discoverypb.DeltaDiscoveryRequest, now time.Time) {
	if d.flight == nil || req.ResponseNonce != d.flight.nonce {
		d.stats.stale++
		return
	}
	d.stats.lastReply = now
	if req.ErrorDetail != nil {
		d.stats.nacks++
		d.stats.lastNACK, d.stats.lastNACKNonce, d.stats.lastNACKAt = clip(req.ErrorDetail.Message, 4096), d.flight.nonce, now
	} else {
		d.stats.acks++
		d.stats.acked = d.flight.summary()
	}
	if d.flight.complete {
		d.stats.synced = max(d.stats.synced, d.flight.version)
	}
	d.flight = nil
}

// clip bounds a text from outside.
func clip(s string, n int) string {
	if len(s) > n {
		return s[:n] + "..."
	}
	return s
}

// summary is a message without its content.
func (m *message) summary() *message {
	return &message{nonce: m.nonce, version: m.version, complete: m.complete}
}

// reported takes over what the node said that it has from an earlier stream.
func (d *subscription) reported() {
	if len(d.initial) == 0 {
		return
	}
	list := make([]*resource, 0, len(d.initial))
	like := d.snap.table(d.typeURL)
	for name, version := range d.initial {
		r := like.get(name)
		if r == nil && !d.wildcard && len(d.snap.resolve(d.typeURL, name)) > 0 {
			continue // a "network/ip" that it asked for: not what the resource is called
		}
		if r == nil || r.version != version {
			r = &resource{name: name, version: version}
		}
		list = append(list, r)
	}
	d.known, d.initial = makeTable(list, like).shards, nil
}

// publish brings a newer snapshot.
func (d *subscription) publish(s *snapshot) {
	if s == nil || s == d.snap {
		return
	}
	d.snap = s
	if d.begun {
		d.retarget()
	}
}

// release lets go of the snapshot, until the next publish, and keeps the tables: indexes of what has been replaced must
// not live as long as a node that does not read.
func (d *subscription) release() {
	if d.wildcard {
		d.snap = nil
	}
}

func (d *subscription) retarget() {
	d.reported()
	if d.wildcard {
		d.target = d.snap.table(d.typeURL)
	} else {
		d.target = d.snap.wanted(d.typeURL, d.snap.own(d.node, d.workload), d.names, d.target)
	}
}

// forget drops from what the node has what it no longer wants: it needs no word of the end of what it gave up.
func (d *subscription) forget() {
	for i, s := range d.known {
		if s == nil || s == d.target.shards[i] {
			continue
		}
		kept := slices.DeleteFunc(slices.Clone(*s), func(r *resource) bool { return d.target.get(r.name) == nil })
		d.known[i] = &kept
	}
}

// next makes the next message, of at most limit bytes unless one resource is larger; nil if there is nothing to say
// or the last one has not been replied to.
func (d *subscription) next(limit int) *message {
	if d.snap == nil || d.flight != nil || !d.begun {
		return nil
	}
	m := &message{version: d.snap.version}
	room := budget{limit: limit}
	m.complete = d.answer(m, &room) && d.change(m, &room) && d.remove(m, &room)
	if len(m.items) == 0 && len(m.removed) == 0 && !d.due {
		d.stats.synced = max(d.stats.synced, m.version)
		return nil
	}
	d.due = !m.complete // the word that this was all must follow, even if there is nothing else to say by then
	d.nonces++
	m.nonce = "v" + strconv.FormatUint(m.version, 10) + "-" + strconv.FormatUint(d.nonces, 10)
	return m
}

// sent notes that a message is under way.
func (d *subscription) sent(m *message, now time.Time) {
	d.flight = m.summary()
	d.stats.sent = d.flight
	d.stats.lastSent = now
	d.stats.messages++
	d.stats.resources += uint64(len(m.items))
	d.stats.removed += uint64(len(m.removed))
}

// budget is the room in a message.
type budget struct{ used, limit int }

// take reports whether n bytes fit; the first always do.
func (b *budget) take(n int) bool {
	if b.used > 0 && b.used+n > b.limit {
		return false
	}
	b.used += n
	return true
}

// answer adds what was asked for by name. Like change and remove it returns false if there is no more room.
func (d *subscription) answer(m *message, room *budget) bool {
	listed := make(map[string]int) // name -> index in items: what several names mean is sent once
	for ; len(d.asked) > 0; d.asked = d.asked[1:] {
		name := d.asked[0]
		found := d.snap.resolve(d.typeURL, name)
		if len(found) == 0 {
			if !room.take(len(name) + 8) {
				return false
			}
			m.removed = append(m.removed, name)
		}
		for n, r := range found {
			at, ok := listed[r.name]
			if !ok {
				if !room.take(r.size() + len(name)) {
					if n > 0 { // the name is answered; the rest, if new to the node, is a change
						d.asked = d.asked[1:]
					}
					return false
				}
				at = len(m.items)
				listed[r.name] = at
				m.items = append(m.items, item{resource: r})
				i := shardOf(r.name)
				d.known[i] = d.known[i].with(r)
			}
			if r.name != name && !slices.Contains(r.aliases(), name) {
				m.items[at].extra = append(m.items[at].extra, name)
			}
		}
	}
	d.asked = nil
	return true
}

// change adds what is new or different. A shard that fits in part counts as known in part.
func (d *subscription) change(m *message, room *budget) bool {
	for i, have := range d.known {
		want := d.target.shards[i]
		if have == want {
			continue
		}
		changed, gone := have.diff(want)
		for n, r := range changed {
			if !room.take(r.size()) {
				d.known[i] = have.with(changed[:n]...)
				return false
			}
			m.items = append(m.items, item{resource: r})
		}
		for _, name := range gone {
			d.gone[name] = struct{}{}
		}
		d.known[i] = want
	}
	return true
}

// remove adds the names that are gone, when all else has been said.
func (d *subscription) remove(m *message, room *budget) bool {
	if len(d.gone) == 0 {
		return true
	}
	for _, name := range slices.Sorted(maps.Keys(d.gone)) {
		if d.target.get(name) == nil { // or it has come back
			if !room.take(len(name) + 8) {
				return false
			}
			m.removed = append(m.removed, name)
		}
		delete(d.gone, name)
	}
	return true
}
