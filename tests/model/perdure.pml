/* One workflow, two workers, a sender, and a network that delays, repeats and loses: start, claim, flush, lease, suspend,
 * wake. The workflow records a step, receives a message, records that, and ends.
 *
 * What must hold, whatever the order:
 *   - no write is accepted from a tenure that is over        (assert in accept: the ghost of the request is the tenure)
 *   - nothing is recorded twice, and nothing out of order    (assert in accept)
 *   - who claims knows all that is recorded                  (assert after the load)
 *   - it comes to its end                                    (assert at timeout: nobody can move any more)
 *
 * Variants that are known to be bad, each of which breaks one of these:
 *   -DSNAPSHOT_FENCE   a flush looks at the entry, and writes later, without a lock in between
 *   -DNO_WAKE_COUNTER  a suspension is accepted, whatever was sent since the run last looked
 *   -DEPOCH_RESET      a workflow that is woken begins at epoch 0 again
 *   -DCLAIM_AND_LOAD   a claim reads the history in the statement that takes the entry: as it was before that
 */

#define WORKERS 2
#define NOBODY 9
#define LEASES 2   /* how often a lease may run out */
#define COPIES 1   /* how often a request may be sent once more */

mtype = { RECORD, SUSPEND, END };

/* the entry, and what hangs on it */
byte holder = NOBODY;
byte epoch = 0;
byte wakes = 0;
bool waiting = false;
bool ended = false;
byte recorded = 0;
byte sent = 0;
byte by_worker[3];
byte by_epoch[3];

/* not in the database: which claim is the present one */
byte tenure = 0;

byte leases = 0;
byte copies = 0;

/* who, epoch, tenure, number of the request, what, value (of a RECORD) or wakes seen (of a SUSPEND) */
chan wire = [4] of { byte, byte, byte, byte, mtype, byte };
mtype = { OK, LOST, AWAKE };
chan answers[WORKERS] = [2] of { byte, mtype };

inline answer(who, number, what) {
    if
    :: nfull(answers[who]) -> answers[who]!number, what
    :: full(answers[who])      /* it has been given up */
    fi
}

inline accept() {
    assert(ghost == tenure);
    if
    :: what == RECORD && recorded >= value ->
        /* it is there already: was it this very request? */
        if
        :: by_worker[value] == who && by_epoch[value] == at -> answer(who, number, OK)
        :: else -> answer(who, number, LOST)
        fi
    :: what == RECORD && recorded < value ->
        assert(recorded == value - 1);
        recorded = value;
        by_worker[value] = who;
        by_epoch[value] = at;
        answer(who, number, OK)
    :: what == SUSPEND ->
        if
#ifdef NO_WAKE_COUNTER
        :: true ->
#else
        :: wakes == value ->
#endif
            waiting = true;
            holder = NOBODY;
            answer(who, number, OK)
#ifndef NO_WAKE_COUNTER
        :: else -> answer(who, number, AWAKE)
#endif
        fi
    :: what == END ->
        assert(recorded == 2);
        ended = true;
        holder = NOBODY;
        answer(who, number, OK)
    fi
}

/* A statement arrives; the network may have let others by. */
proctype Server() {
    byte who, at, ghost, number, value;
    mtype what;
    bool holds;
    do
    :: atomic {
        wire?who, at, ghost, number, what, value;
        if
        :: true -> skip
        :: nempty(wire) -> wire!who, at, ghost, number, what, value; goto next
        fi;
        holds = (holder == who && epoch == at)
       }
       atomic {
#ifndef SNAPSHOT_FENCE
        holds = (holder == who && epoch == at);     /* under the lock on the entry */
#endif
        if
        :: holds -> accept()
        :: !holds && what == RECORD && recorded >= value && by_worker[value] == who && by_epoch[value] == at ->
            answer(who, number, OK)     /* in doubt, and it was committed */
        :: else -> answer(who, number, LOST)
        fi
       };
next:  skip
    od
}

/* Ask, until there is an answer; a request may be sent twice, and both copies arrive. */
inline ask(what, value) {
    number = number + 1;
    wire!me, mine, ghost, number, what, value;
    do
    :: answers[me]?got, reply ->
        if
        :: got == number -> break
        :: else -> skip
        fi
    :: atomic { copies < COPIES && nfull(wire) -> copies++; wire!me, mine, ghost, number, what, value }
    od
}

proctype Worker(byte me) {
    byte mine, ghost, number, got, known, seen, heard;
    mtype reply;
    do
    :: ended -> break
    :: !ended && holder == NOBODY && !waiting ->
#ifdef CLAIM_AND_LOAD
        known = recorded;
        seen = wakes;
        heard = sent;
#endif
        atomic {
            if
            :: !ended && holder == NOBODY && !waiting ->
                holder = me;
                epoch = epoch + 1;
                mine = epoch;
                tenure = tenure + 1;
                ghost = tenure
            :: else -> goto out
            fi
        }
#ifndef CLAIM_AND_LOAD
        atomic { known = recorded; seen = wakes; heard = sent; assert(holder != me || epoch != mine || known == recorded) }
#endif
        assert(!(holder == me && epoch == mine && ghost == tenure) || known == recorded);
goon:
        if
        :: known == 0 ->
            ask(RECORD, 1);
            if
            :: reply == OK -> known = 1; goto goon
            :: else -> goto out
            fi
        :: known == 1 && heard > 0 ->
            ask(RECORD, 2);
            if
            :: reply == OK -> known = 2; goto goon
            :: else -> goto out
            fi
        :: known == 1 && heard == 0 ->
            ask(SUSPEND, seen);
            if
            :: reply == AWAKE -> atomic { seen = wakes; heard = sent }; goto goon
            :: else -> goto out
            fi
        :: known == 2 -> ask(END, 0)
        fi;
out:    skip
    od
}

/* A lease runs out, of a worker that is dead, frozen, or merely slow: others take over, and it may not know. */
proctype Reaper() {
    do
    :: atomic { leases < LEASES && holder != NOBODY -> leases++; holder = NOBODY }
    :: ended -> break
    od
}

proctype Sender() {
    atomic {
        sent = sent + 1;
        wakes = wakes + 1;
        if
        :: waiting ->
            waiting = false;
#ifdef EPOCH_RESET
            epoch = 0
#endif
        :: else -> skip
        fi
    }
}

init {
    atomic { run Server(); run Worker(0); run Worker(1); run Reaper(); run Sender() }
    timeout -> assert(ended && recorded == 2)
}
