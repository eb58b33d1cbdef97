package fair

import "sync/atomic"

// Budget is how many bytes may lie in ztun's memory for others: all of the daemon's, and within it each pod's. It turns
// nothing away: whoever fills it asks Tight, and takes less while that holds. All methods may be called at the same
// time, and on nil, which is a budget without end.
type Budget struct {
	parent *Budget
	limit  int64
	used   atomic.Int64
}

// tightAt is the part of a budget that may be used before it counts as tight, in eighths: what is under way, and what
// new connections need at least, comes on top.
const tightAt = 6

// NewBudget makes a budget of limit bytes (0: no end of its own) within parent, which may be nil.
func NewBudget(parent *Budget, limit int64) *Budget { return &Budget{parent: parent, limit: limit} }

// Add accounts for n more bytes, or for fewer if n is negative.
func (b *Budget) Add(n int64) {
	for ; b != nil; b = b.parent {
		b.used.Add(n)
	}
}

// Tight reports whether those who hold bytes are to take less: this budget is nearly used up, or one that it is part
// of.
func (b *Budget) Tight() bool {
	for ; b != nil; b = b.parent {
		if b.limit > 0 && b.used.Load() >= b.limit/8*tightAt {
			return true
		}
	}
	return false
}

// Used is how many bytes are accounted for.
func (b *Budget) Used() int64 {
	if b == nil {
		return 0
	}
	return b.used.Load()
}

// Limit is what NewBudget was told.
func (b *Budget) Limit() int64 {
	if b == nil {
		return 0
	}
	return b.limit
}

// accountStep is how far an Account may be off in its Budget, in bytes.
const accountStep = 64 << 10

// Account is what one connection holds of a budget. It tells the budget in steps, so that counting costs one atomic
// addition most of the time. The zero value counts by itself; all methods may be called at the same time.
type Account struct {
	budget     *Budget
	held, told atomic.Int64
}

// Open makes the account one of b. It is called before anything is counted.
func (a *Account) Open(b *Budget) { a.budget = b }

// Load is what is held.
func (a *Account) Load() int64 { return a.held.Load() }

// Add counts n bytes more, or fewer. What is back at nothing leaves nothing in the budget.
func (a *Account) Add(n int64) int64 {
	held := a.held.Add(n)
	for now := held; a.budget != nil; now = a.held.Load() {
		told := a.told.Load()
		if d := now - told; d == 0 || now != 0 && d < accountStep && d > -accountStep {
			break
		}
		if a.told.CompareAndSwap(told, now) {
			a.budget.Add(now - told)
		}
	}
	return held
}
